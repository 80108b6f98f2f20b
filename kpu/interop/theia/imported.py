"""Taking a dataset of Theia's in as a cache, and checking on the way what its own loader takes for granted.

Two passes over the features: one for statistics, one to encode and commit. The images' tars become the cache's source.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from kpu.commit.plan import publish_plan
from kpu.errors import ConfigError
from kpu.format.plan import DEFAULT_MAX_PIXELS, Decoding, Plan
from kpu.format.teacher import CodecSpec, OutputSpec, ShardFormat, TeacherSpec
from kpu.interop.theia.columns import Dataset, FeatureReader, check_count, check_keys, find_dataset
from kpu.interop.theia.names import check_names
from kpu.interop.theia.passes import Passes, Progress
from kpu.records.plan import load_plan
from kpu.records.samples import split_parts
from kpu.sources.files import is_local
from kpu.sources.rows import listed_rows
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.storage.created import Created
from kpu.storage.leases import lease
from kpu.storage.open import location_exists, open_storage
from kpu.util.cores import usable_cores
from kpu.util.digests import digest

_PRECISIONS: Final[dict[str, Any]] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
UnitRows = Callable[[int, Sequence[TeacherSpec]], int]


@dataclass(frozen=True)
class TheiaImport:
    """What was taken in; `masked` images could not be decoded. `committed` units of teachers are this call's own."""

    out: str
    teachers: tuple[str, ...]
    samples: int
    masked: int
    committed: int


def import_theia(
    root: str,
    out: str,
    *,
    dataset: str,
    split: str,
    codec: CodecSpec,
    shards: ShardFormat,
    run: str,
    unit_rows: UnitRows,
    progress: Progress | None = None,
    created: Created | None = None,
) -> TheiaImport:
    """Make a cache of one split, or go on with it.

    Args:
        root: a folder or URL, with the dataset below it.
        out: a new place, or what an earlier call left there.
        dataset: its name.
        split: which part of it.
        codec: how features are stored.
        shards: the format of the cache's shards.
        run: whose temporary folder at `out` is used.
        unit_rows: chooses the rows of a unit, from their number and the teachers.
        progress: called with (samples done, samples in all), both passes over each model counted.
        created: notes what is made at `out`, for cleaning up if this fails.

    Raises:
        SourceError: the dataset is not sound; naming tar and member.
        MismatchError: another cache exists at `out`, or one of other features: of what is committed already, one row
            of each tar is compared.
        ConfigError: a model's name cannot be a teacher's.
    """
    check_names(dataset, split)
    folder = f"{(os.path.abspath(root) if is_local(root) else root).rstrip('/')}/{dataset}"  # noqa: PTH100
    found = find_dataset(folder, split)
    samples = check_keys(found)
    check_count(found, samples)
    readers = {_teacher_name(model, found): FeatureReader(found, model) for model in found.models}
    specs = {name: _spec(name, reader, codec, shards) for name, reader in readers.items()}
    existing = load_plan(open_storage(out)) if location_exists(out) else None
    rows = existing.unit_rows if existing is not None else unit_rows(samples, list(specs.values()))
    storage = open_storage(out, create=True, created=created)
    with lease(storage, run), ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="kpu-import") as pool:
        plan = _plan(storage, found, rows, run)
        work = Passes(storage, plan, found, run, pool, progress or _silent)
        teachers = {name: work.teacher(spec, readers[name]) for name, spec in specs.items()}
        committed, masked = work.units(teachers, readers)
    return TheiaImport(storage.url, tuple(teachers), plan.rows, masked, committed)


def _silent(_done: int, _total: int) -> None:
    """Nobody is watching."""


def _teacher_name(model: str, found: Dataset) -> str:
    name = paths.check_name("teacher", model.lower())
    same = [other for other in found.models if other.lower() == name]
    if len(same) > 1:
        raise ConfigError(f"{found.files.root}: expected names that differ in lower case, found {same}; rename one")
    return name


def _spec(name: str, reader: FeatureReader, codec: CodecSpec, shards: ShardFormat) -> TeacherSpec:
    (channels, height, width), vector, dtype = reader.shapes
    patch = OutputSpec(name="patch", shape=(height * width, channels), grid=(height, width))
    outputs = (patch,) if vector is None else (OutputSpec(name="global", shape=vector), patch)
    model = f"theia:{reader.model}"
    return TeacherSpec(
        name=name,
        model=model,
        weights=None,
        weights_digest=digest(model.encode()),
        input=None,
        precision=_PRECISIONS[dtype],
        outputs=outputs,
        codec=codec,
        format=shards,
    )


def _plan(storage: Storage, found: Dataset, unit_rows: int, run: str) -> Plan:
    """Publish the plan that an extraction from the images' tars would make, or return the existing one."""
    source = found.images

    build = partial(
        Plan,
        source=source.spec.model_copy(update={"decoding": Decoding(max_pixels=DEFAULT_MAX_PIXELS)}),
        classes=source.classes,
        views=1,
        seed=0,
        unit_rows=unit_rows,
        threads=usable_cores(),  # what `extract` computes with when it adds a teacher
    )
    return publish_plan(storage, split_parts(listed_rows(source, 1, 0), unit_rows), build, run, unit_rows=unit_rows)
