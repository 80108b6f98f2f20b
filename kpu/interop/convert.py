"""A cache once more, in the other shard format or decoded: the same plan, images, teachers and commits.

Stored integers go from one container into the other as they are, so that Zarr to tars and back gives the same bytes.
Everything is published and committed as an extraction does it, and can be taken up again where it was stopped.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kpu.commit.conflicts import publishing
from kpu.commit.plan import refuse_foreign, sealed_by_plan
from kpu.commit.shards import BytesHandle, ShardTransaction
from kpu.commit.teacher import OWN_CALIBRATION, publish_teacher
from kpu.errors import ConfigError, CorruptError, MismatchError
from kpu.format.commits import OutputRecord, ShardRecord, UnitRecord
from kpu.format.statistics import load_statistics, same_statistics
from kpu.format.teacher import CodecSpec, OutputSpec, ShardFormat, TeacherSpec
from kpu.reading.cache import Cache, open_cache
from kpu.reading.teachers import CachedTeacher
from kpu.records.plan import image_layouts, load_plan, read_checked, sample_digests
from kpu.records.teachers import (
    STATISTICS,
    PublishedTeacher,
    output_shard,
    read_teacher,
    teacher_folders,
    teacher_names,
)
from kpu.records.units import load_images_record, load_unit, sealed_files, units_left
from kpu.shards.layout import ArrayLayout, Shard
from kpu.shards.reader import open_shard
from kpu.shards.writer import encode_shard
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.storage.created import Created
from kpu.storage.leases import lease
from kpu.storage.open import open_storage
from kpu.util.digests import seal_document
from kpu.util.failpoints import failpoint

Progress = Callable[[int, int], None]
_LISTED: Final = 10


@dataclass(frozen=True)
class Conversion:
    """What was done: units of teachers converted by this call, and units that existed already; bytes of the former.

    `unfinished` are other teachers at `out` that an earlier call left incomplete.
    """

    out: str
    teachers: tuple[str, ...]
    converted: int
    existing: int
    bytes: int
    unfinished: tuple[str, ...] = ()


def complete_teachers(cache: Cache, wanted: Sequence[str]) -> list[str]:
    """The teachers to export, all where none is named.

    Raises:
        ConfigError: there is none of that name, or it has units that are not committed.
    """
    names = list(dict.fromkeys(wanted)) or list(cache.teachers)
    if not names:
        raise ConfigError(f"{cache.path}: expected a cache with a teacher, found none; run `kpu-cache extract` first")
    for name in names:
        if name not in cache.teachers:
            raise ConfigError(f"teacher {name!r}: expected one of {sorted(cache.teachers)} in {cache.path}")
        missing = np.flatnonzero(~cache.teachers[name].committed()).tolist()
        if missing:
            listed = ", ".join(map(str, missing[:_LISTED])) + (", ..." if len(missing) > _LISTED else "")
            raise ConfigError(
                f"{cache.path}: teacher {name!r}: expected all {cache.plan.units} units, found {len(missing)} not "
                f"committed (unit {listed}); complete it with the same `kpu-cache extract` command, or leave it out"
            )
    return names


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    shards: ShardFormat,
    run: str,
    teachers: Sequence[str] = (),
    dequantise: bool = False,
    progress: Progress | None = None,
    created: Created | None = None,
) -> Conversion:
    """Write the cache at `source` again at `out`, or go on with that.

    Args:
        source: a cache, complete for the teachers.
        out: a new place, or what an earlier call left there.
        shards: the format of its shards.
        run: whose temporary folder at `out` is used.
        teachers: which; all where none is named.
        dequantise: store the decoded values as float32 instead of the grid's integers.
        progress: called with (units done, units in all), each teacher's counted apart.
        created: notes what is made at `out`, for cleaning up if this fails.

    Raises:
        ConfigError: a teacher is not there or not complete, or `out` is `source`.
        MismatchError: a cache of another plan, or a teacher with other settings, exists at `out`.
        CorruptError: what had to be read is damaged.
    """
    cache = open_cache(source)
    names = complete_teachers(cache, teachers)
    storage = open_storage(out, create=True, created=created)
    if storage.url == cache.path:
        raise ConfigError(f"out: {storage.url}: expected another place than the cache to export; choose another")
    total = cache.plan.units * len(names)
    converted = written = 0
    with lease(storage, run), ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="kpu-convert") as pool:
        copy = _Copy(cache, storage, run, pool)
        copy.plan()
        targets = {name: copy.teacher(cache.teachers[name], shards, dequantise) for name in names}
        for unit in range(cache.plan.units):
            copy.images(unit)
            for place, (name, target) in enumerate(targets.items()):
                size = copy.unit(cache.teachers[name].published, target, unit)
                converted += size is not None
                written += size or 0
                if progress:
                    progress(unit * len(names) + place + 1, total)
    others = [name for name in teacher_folders(storage) if name not in names]
    left = units_left(storage, cache.plan, others)
    unfinished = tuple(name for name in others if left[name].any())
    return Conversion(storage.url, tuple(names), converted, total - converted, written, unfinished)


class _Copy:
    """The steps of one conversion."""

    def __init__(self, cache: Cache, storage: Storage, run: str, pool: ThreadPoolExecutor) -> None:
        self._cache, self._plan = cache, cache.plan
        self._origin, self._storage = open_storage(cache.path), storage
        self._run, self._pool = run, pool

    def plan(self) -> None:
        """Copy the plan and what it seals, byte for byte."""
        raw = self._origin.read(paths.PLAN)
        if load_plan(self._storage) is None:
            refuse_foreign(self._storage)
            with publishing(self._storage, paths.PLAN, self._run, lambda: sealed_by_plan(self._storage)) as publish:
                for file, expected in {**self._plan.metadata, **sample_digests(self._plan)}.items():
                    publish(file, read_checked(self._origin, file, expected))
                failpoint("plan.samples")
                self._storage.publish(paths.PLAN, raw, run=self._run)
                failpoint("plan.published")
        if self._storage.read(paths.PLAN) != raw:
            raise MismatchError(
                f"out: {self._storage.url}: expected a new place, or a cache with the plan of {self._cache.path}, "
                "found a cache with another plan; choose another"
            )

    def teacher(self, teacher: CachedTeacher, shards: ShardFormat, dequantise: bool) -> PublishedTeacher:
        """Publish a teacher with the statistics and the head that it has."""
        source = teacher.published
        file = f"{paths.teacher(source.spec.name)}/{STATISTICS}"
        raw = read_checked(self._origin, file, source.files[STATISTICS])
        calibration = load_statistics(raw, file)[1].get("calibration", OWN_CALIBRATION)
        codec = CodecSpec(name="fp32") if dequantise else source.spec.codec
        spec = source.spec.model_copy(update={"format": shards, "codec": codec})
        self._check_existing(spec)
        target = publish_teacher(
            self._storage, self._plan, spec, source.statistics, source.head, self._run, calibration=calibration
        )
        heads = [[] if head is None else list(head) for head in (source.head, target.head)]
        same_head = len(heads[0]) == len(heads[1]) and all(map(np.array_equal, *heads))
        if not same_head or not same_statistics(source.statistics, target.statistics):
            raise MismatchError(
                f"out: {self._storage.url}: teacher {spec.name!r} exists there with another calibration or head than "
                f"in {self._cache.path}; choose another place"
            )
        return target

    def _check_existing(self, spec: TeacherSpec) -> None:
        """Refuse another shard format or codec than an earlier export chose, naming the option."""
        if spec.name not in teacher_names(self._storage):
            return
        existing = read_teacher(self._storage, spec.name).spec
        for option, found, wanted in (
            ("--format", existing.format, spec.format),
            ("--dequantise", existing.codec.name == "fp32", spec.codec.name == "fp32"),
        ):
            if found != wanted:
                raise MismatchError(
                    f"out: {self._storage.url}: teacher {spec.name!r} was exported there with {option} {found}, found "
                    f"{wanted}; use the same, or choose another place"
                )

    def images(self, unit: int) -> None:
        """Copy what decoding found in a unit, byte for byte."""
        marker = paths.commit(paths.IMAGES, unit)
        record = load_images_record(self._origin, self._plan, unit)
        if record is None:
            raise CorruptError(marker, "is missing, though a teacher has committed the unit", unit=unit)
        if self._storage.size(marker) is None:
            shards, keys = ShardTransaction(self._storage, unit, marker, self._run), dict[str, ShardRecord]()
            for name, array in image_layouts(self._plan.rows, self._plan.unit_rows).items():
                key = array.key(f"{paths.IMAGES}/{name}", unit)
                keys[key] = record.arrays[name]
                shards.publish(key, _CopiedShard(self._origin, key, array, record.arrays[name], unit))
            self._storage.publish(marker, self._origin.read(marker), run=self._run)
            failpoint("unit.images")
            if load_images_record(self._storage, self._plan, unit) == record:
                shards.restore(keys)
        if load_images_record(self._storage, self._plan, unit) != record:
            raise self._other(marker)

    def unit(self, source: PublishedTeacher, target: PublishedTeacher, unit: int) -> int | None:
        """Convert one unit of a teacher; bytes of its shards, None if it is committed already."""
        marker = paths.commit(paths.teacher(target.spec.name), unit)
        record = load_unit(self._origin, self._plan, source, unit)
        if self._storage.size(marker) is not None:
            self._compare(load_unit(self._storage, self._plan, target, unit), record, marker)
            return None
        shards, outputs = ShardTransaction(self._storage, unit, marker, self._run), dict[str, OutputRecord]()
        for output in target.spec.outputs:
            converted = _ConvertedShard(self._cache, source, target, output, unit, self._pool)
            result = shards.publish(output_shard(target, output, unit), converted)
            if result is None:  # somebody else has committed the unit meanwhile
                break
            fidelity = record.outputs[output.name].fidelity
            outputs[output.name] = OutputRecord(**result.record.model_dump(), fidelity=fidelity)
        else:
            failpoint("unit.shards")
            changes = {"fingerprint": target.fingerprint, "files": sealed_files(target), "outputs": outputs}
            made = record.model_copy(update=changes)
            self._storage.publish(marker, seal_document(made.model_dump(mode="json")), run=self._run)
        existing = load_unit(self._storage, self._plan, target, unit)
        shards.restore({output_shard(target, o, unit): existing.outputs[o.name] for o in target.spec.outputs})
        failpoint("unit.committed")
        self._compare(existing, record, marker)
        return sum(output.bytes for output in existing.outputs.values())

    def _compare(self, existing: UnitRecord, record: UnitRecord, marker: str) -> None:
        """Check that the unit at `out` was made from this record."""
        kept = ("row_digest", "masked", "masked_digest", "nonfinite")
        same = all(getattr(existing, field) == getattr(record, field) for field in kept)
        if not same or any(existing.outputs[name].fidelity != out.fidelity for name, out in record.outputs.items()):
            raise self._other(marker)

    def _other(self, marker: str) -> MismatchError:
        return MismatchError(
            f"out: {self._storage.url}/{marker}: expected a commit record made from {self._cache.path}, found one of "
            "other content; choose another place"
        )


@dataclass(frozen=True)
class _CopiedShard:
    """A committed shard of another cache, copied byte for byte; accepts no other."""

    origin: Storage
    key: str
    layout: ArrayLayout
    record: ShardRecord
    unit: int

    def encode(self) -> Shard:
        try:
            raw = self.origin.read(self.key, limit=self.record.bytes)
        except FileNotFoundError:
            raise CorruptError(self.key, "is missing, though its unit is committed", unit=self.unit) from None
        handle = BytesHandle(raw)
        open_shard(handle, self.layout, self.record, file=self.key, unit=self.unit, teacher=None).verify()
        return Shard(raw, self.record.seal)

    def accepts(self, _values: npt.NDArray[Any]) -> bool:
        return False


@dataclass(frozen=True)
class _ConvertedShard:
    """One output of one unit of `source`, encoded for `target`; accepts no other."""

    cache: Cache
    source: PublishedTeacher
    target: PublishedTeacher
    output: OutputSpec
    unit: int
    pool: Executor

    @property
    def layout(self) -> ArrayLayout:
        return self.target.layouts[self.output.name]

    def encode(self) -> Shard:
        teacher, output = self.source.spec.name, self.output.name
        found = self.cache.plan.unit_range(self.unit)
        rows = slice(found.start, found.stop)
        stored = self.cache.read_encoded(teacher, output, rows).values
        if self.target.spec.codec != self.source.spec.codec:
            stored = self.target.grids[output].encode(self.source.grids[output].decode(stored))
        stored[~self.cache.valid(rows, teacher=teacher)] = self.layout.fill
        return encode_shard(stored, self.layout, self.unit, pool=self.pool)

    def accepts(self, _values: npt.NDArray[Any]) -> bool:
        return False
