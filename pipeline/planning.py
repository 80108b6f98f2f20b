"""Turning a listing of samples into the cache's plan, or checking that it still is the plan that stands."""

import itertools
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from cache.errors import MismatchError
from cache.plans import check_same_plan, load_plan, publish_plan
from cache.samples import Fingerprint, sample_schema, split_parts
from cache.spec import CodecSpec, OutputSpec, Plan, TeacherSpec
from cache.storage import Storage
from pipeline.config import ExecutorConfig, ExtractConfig
from pipeline.observers import Observer
from pipeline.sources import Source
from pipeline.views import draw_views

SHARD_BYTES = 64 * 2**20
UNIT_BYTES = 2**30
SMALLEST_UNIT, LARGEST_UNIT = 64, 4096
UNITS_WANTED = 16


def choose_threads(config: ExecutorConfig, standing: Plan | None, observer: Observer) -> int:
    """CPU threads of one worker: those of the plan, so that a resumed cache has the same bits."""
    wanted = len(os.sched_getaffinity(0)) if config.threads == "auto" else config.threads
    if standing is None or standing.threads == wanted:
        return wanted
    if config.threads == "auto":
        return standing.threads
    observer.warn(
        f"executor.threads: this cache was begun with {standing.threads} threads; with {wanted} its values may differ "
        "from those by rounding (never by more than one grid step)"
    )
    return wanted


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
    """Size of one row on disk: exact for lossless codecs, a usual 1 byte a value for `uniform`."""
    return math.prod(output.shape) * (1 if codec.name == "uniform" else codec.item_bytes)


def plan_cache(
    storage: Storage,
    source: Source,
    config: ExtractConfig,
    teachers: Sequence[TeacherSpec],
    threads: int,
    run: str,
) -> Plan:
    """Publish the plan of a new cache, or return the one that stands if it was made from the same data.

    Raises:
        MismatchError: the source's listing, or a setting that fixes rows, differs from the standing plan's.
        SourceError: the source cannot be listed.
    """
    standing = load_plan(storage)
    if standing is not None:
        _check_settings(standing, source, config)
    tables = listed_rows(source, config)
    unit_rows = standing.unit_rows if standing is not None else config.unit_rows
    if unit_rows == "auto":
        head, tables = _peek(tables, UNITS_WANTED * LARGEST_UNIT)
        unit_rows = choose_unit_rows(sum(table.num_rows for table in head), teachers)
        tables = itertools.chain(head, tables)

    def build(fingerprint: str, digests: tuple[str, ...], samples: int, metadata: dict[str, str]) -> Plan:
        return Plan(
            source=source.spec,
            fingerprint=fingerprint,
            classes=source.classes,
            samples=samples,
            views=config.views,
            seed=config.seed,
            unit_rows=unit_rows,
            threads=threads,
            samples_digests=digests,
            metadata=metadata,
        )

    parts = split_parts(tables, unit_rows)
    if standing is None:
        return publish_plan(storage, parts, build, run, unit_rows=unit_rows)
    fingerprint = Fingerprint()
    rows = 0
    for part in parts:
        fingerprint.update(part)
        rows += part.num_rows
    if rows != standing.rows:
        raise MismatchError(
            f"data.source: the cache was planned for {standing.rows} rows, the source now lists {rows}; restore the "
            "images that were there, or extract to another `out`"
        )
    check_same_plan(standing, build(fingerprint.hexdigest(), (), standing.samples, {}))
    return standing


def listed_rows(source: Source, config: ExtractConfig) -> Iterator[pa.Table]:
    """The sample table, one record a row: every sample `views` times."""
    schema = sample_schema(source.spec.kind)
    for batch in source.batches():
        samples = pa.Table.from_batches([batch])
        table = samples.take(np.repeat(np.arange(samples.num_rows), config.views)) if config.views > 1 else samples
        view = np.tile(np.arange(config.views, dtype=np.int32), samples.num_rows)
        table = table.append_column("view", pa.array(view))
        table = table.append_column("draws", _draws(samples, config))
        yield table.select(schema.names).cast(schema)


def _draws(samples: pa.Table, config: ExtractConfig) -> pa.FixedSizeListArray:
    keys = samples["key"].to_pylist() if config.views > 1 else range(samples.num_rows)
    return draw_views(keys, config.views, config.seed)


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


def _check_settings(plan: Plan, source: Source, config: ExtractConfig) -> None:
    pairs = [("views", plan.views, config.views), ("seed", plan.seed, config.seed)]
    if config.unit_rows != "auto":
        pairs.append(("unit_rows", plan.unit_rows, config.unit_rows))
    pairs.append(("data.source (kind)", plan.source.kind, source.spec.kind))
    for name, there, here in pairs:
        if there != here:
            raise MismatchError(
                f"{name}: {config.out} was made with {there}, this run asks for {here}; use the same, or another `out`"
            )
