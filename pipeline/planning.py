"""Turn a listing of samples into the cache's plan, or check that it still gives the existing plan."""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from kpu.commit.plan import publish_plan
from kpu.errors import MismatchError, SourceError
from kpu.format.plan import DEFAULT_MAX_PIXELS, Decoding, Plan
from kpu.format.teacher import CodecSpec, OutputSpec, TeacherSpec
from kpu.records.plan import load_plan
from kpu.records.samples import Fingerprint, Samples, split_parts
from kpu.sources import ImageSource, describe_left_out, open_source
from kpu.sources.rows import listed_rows
from kpu.storage.base import Storage
from pipeline.config import ExtractConfig
from pipeline.run.observers import Observer
from pipeline.sections import DataConfig, ExecutorConfig

SHARD_BYTES = 64 * 2**20
UNIT_BYTES = 2**30
SMALLEST_UNIT, LARGEST_UNIT = 64, 4096
UNITS_WANTED = 16


def open_data(data: DataConfig, existing: Plan | None) -> ImageSource:
    """The source, to be decoded as the existing plan says where the configuration leaves it open.

    Raises:
        SourceError, ConfigError: as `open_source`.
    """
    source = open_source(data)
    decoding = Decoding(max_pixels=DEFAULT_MAX_PIXELS) if existing is None else existing.source.decoding
    wanted = {name: value for name in Decoding.model_fields if (value := getattr(data, name)) is not None}
    source.spec = source.spec.model_copy(update={"decoding": decoding.model_copy(update=wanted)})
    return source


def choose_threads(config: ExecutorConfig, existing: Plan | None, observer: Observer) -> int | None:
    """CPU threads of one worker: those of the plan, so that a resumed cache has the same bits; None: the executor's."""
    if config.threads == "auto":
        return None if existing is None else existing.threads
    if existing is not None and existing.threads != config.threads:
        observer.warn(
            f"executor.threads: this cache was begun with {existing.threads} threads; with {config.threads} its "
            "values may differ from those by rounding (never by more than one grid step)"
        )
    return config.threads


def choose_unit_rows(rows: int, teachers: Sequence[TeacherSpec]) -> int:
    """The largest power of two that keeps shards near 64 MB, a unit's features under 1 GB, and some 16 units.

    `rows` may be capped: only its order of magnitude up to 16 * 4,096 matters.
    """
    largest = max(stored_bytes_per_row(spec.codec, output) for spec in teachers for output in spec.outputs)
    total = sum(spec.held_bytes_per_row for spec in teachers)
    limit = min(SHARD_BYTES / largest, UNIT_BYTES / total, rows / UNITS_WANTED)
    power = 2 ** int(np.log2(max(limit, 1)))
    return int(min(max(power, SMALLEST_UNIT), LARGEST_UNIT))


def stored_bytes_per_row(codec: CodecSpec, output: OutputSpec) -> int:
    """Size of one row on disk: exact for lossless codecs, a usual 1 byte a value where integers are stored."""
    return math.prod(output.shape) * (codec.item_bytes if codec.step is None else 1)


def plan_cache(
    storage: Storage,
    source: ImageSource,
    config: ExtractConfig,
    teachers: Sequence[TeacherSpec],
    threads: int,
    run: str,
    observer: Observer,
) -> Plan:
    """Publish the plan of a new cache, or return the existing one if it was made from the same data.

    What the listing left out is told to `observer`.

    Raises:
        MismatchError: the source's listing, or a setting that fixes rows, differs from the existing plan's.
        SourceError: the source cannot be listed.
    """
    existing = load_plan(storage)
    if existing is None:
        tables, unit_rows = _listed_in_units(source, config, teachers)
        build = partial(
            Plan,
            source=source.spec,
            classes=source.classes,
            views=config.views,
            seed=config.seed,
            unit_rows=unit_rows,
            threads=threads,
            crop=config.planned_crop,
        )
        try:
            plan = publish_plan(storage, split_parts(tables, unit_rows), build, run, unit_rows=unit_rows)
            tell_left_out(source, observer)
            return plan
        except MismatchError:  # another driver, with other teachers, may have chosen other units at the same time
            existing = load_plan(storage)
            if existing is None:
                raise
    check_settings(existing, source, config)
    check_listing(storage, existing, source, config, observer)
    return existing


def tell_left_out(source: ImageSource, observer: Observer) -> None:
    """Say in one line what the listing left out, and why; and what it noted on how images are read."""
    line = describe_left_out(source.left_out)
    if line:
        observer.phase("plan", line)
    for note in source.notes:
        observer.warn(note)


def _listed_in_units(
    source: ImageSource, config: ExtractConfig, teachers: Sequence[TeacherSpec]
) -> tuple[Iterator[pa.Table], int]:
    """The source's rows, and how many of them are to be a unit."""
    tables = listed_rows(source, config.views, config.seed)
    if config.unit_rows != "auto":
        return tables, config.unit_rows
    head, tables = _peek(tables, UNITS_WANTED * LARGEST_UNIT)
    return itertools.chain(head, tables), choose_unit_rows(sum(table.num_rows for table in head), teachers)


def check_settings(plan: Plan, source: ImageSource, config: ExtractConfig) -> None:
    """Compare what the configuration says of rows with the existing plan, before anything is listed.

    Raises:
        MismatchError: naming the first setting that differs.
    """
    pairs: list[tuple[str, object, object]] = [
        ("views", plan.views, config.views),
        ("crop", plan.crop, config.planned_crop),
        ("seed", plan.seed, config.seed),
    ]
    if config.unit_rows != "auto":
        pairs.append(("unit_rows", plan.unit_rows, config.unit_rows))
    pairs.append(("data.source", f"a {plan.source.kind} source", f"a {source.spec.kind} source"))
    columns = ((name, plan.source.options.get(name), source.spec.options.get(name)) for name in plan.source.options)
    pairs += [(f"data.{name}", there, here) for name, there, here in columns]
    decoding, wanted = (spec.decoding.model_dump() for spec in (plan.source, source.spec))
    pairs += [(f"data.{name}", decoding[name], wanted[name]) for name in decoding]
    for name, there, here in pairs:
        if there != here:
            raise MismatchError(
                f"{name}: the cache at {config.out} was made with {there}, found {here}; use the same, or another `out`"
            )


def check_listing(storage: Storage, plan: Plan, source: ImageSource, config: ExtractConfig, observer: Observer) -> None:
    """List the source again and compare it with the existing plan.

    A cache of an earlier release, whose rows follow that release's rules, keeps them; `observer` is told.

    Raises:
        MismatchError: naming the first row that differs.
        SourceError: the source cannot be listed.
    """
    refused: SourceError | None = None
    try:
        same, rows = _lists_plan(plan, source, config)
    except SourceError as error:
        same, rows, refused = False, 0, error
    if same:
        tell_left_out(source, observer)
        return
    earlier = source.earlier is not None and _lists_plan_if_any(plan, source.earlier, config)
    if refused is not None and not earlier:
        raise refused
    difference = refused or _difference(Samples(storage, plan), plan, source, config, rows)
    if not earlier:
        raise MismatchError(
            f"data.source: the cache at {config.out} was made from other data: {difference}; restore the images that "
            "were there, or extract to another `out`"
        )
    observer.warn(
        f"data.source: the cache at {config.out} was begun by an earlier release and keeps the rows and labels that "
        f"this one listed; today the same source gives others: {difference}; extract to another `out` to have them"
    )


def _lists_plan(plan: Plan, source: ImageSource, config: ExtractConfig) -> tuple[bool, int]:
    """Whether a listing is the one that was planned, and how many rows it has."""
    fingerprint, rows = Fingerprint(), 0
    for table in listed_rows(source, config.views, config.seed):
        fingerprint.update(table)
        rows += table.num_rows
    return (fingerprint.hexdigest(), rows, source.classes) == (plan.fingerprint, plan.rows, plan.classes), rows


def _lists_plan_if_any(plan: Plan, source: ImageSource, config: ExtractConfig) -> bool:
    try:
        return _lists_plan(plan, source, config)[0]
    except SourceError:
        return False


def _difference(samples: Samples, plan: Plan, source: ImageSource, config: ExtractConfig, rows: int) -> str:
    """The first row in which a listing of `rows` rows differs from the sample table, as expected and found."""
    counts = f"expected {plan.rows:,} rows, found {rows:,}; " if rows != plan.rows else ""
    start = 0
    for part, here in enumerate(split_parts(listed_rows(source, config.views, config.seed), plan.unit_rows)):
        there = samples.part(part) if part < samples.parts else samples.schema.empty_table()
        if not there.equals(here):
            pairs = itertools.zip_longest(there.to_pylist(), here.to_pylist())
            row, expected, found = next((row, a, b) for row, (a, b) in enumerate(pairs) if a != b)
            return f"{counts}row {start + row}: {_contrast(expected, found)}"
        start += here.num_rows
    if rows < plan.rows:
        return f"{counts}row {rows}: {_contrast(samples.take([rows]).to_pylist()[0], None)}"
    return f"expected the classes {plan.classes}, found {source.classes}"


def _contrast(expected: dict[str, object] | None, found: dict[str, object] | None) -> str:
    if expected is None or found is None or expected["key"] != found["key"]:
        there, here = (repr(record["key"]) if record else "no image" for record in (expected, found))
        return f"expected {there}, found {here}"
    name = next(name for name in expected if expected[name] != found[name])
    return f"expected {name} {expected[name]!r} for {expected['key']!r}, found {found[name]!r}"


def _peek(batches: Iterator[pa.Table], rows: int) -> tuple[list[pa.Table], Iterator[pa.Table]]:
    """The first tables, up to about `rows` rows, and the rest."""
    head: list[pa.Table] = []
    seen = 0
    for batch in batches:
        head.append(batch)
        seen += batch.num_rows
        if seen >= rows:
            break
    return head, batches
