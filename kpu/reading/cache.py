"""Reading a cache: rows of features by number, checked on every read."""

import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from kpu.errors import ConfigError, CorruptError, MaskedRowError, MissingUnitError
from kpu.format.commits import ImageStatus, ShardRecord
from kpu.format.plan import Plan
from kpu.format.reasons import reason
from kpu.reading.rows import RowSelection, by_unit, row_numbers
from kpu.reading.teachers import CachedTeacher, Teachers
from kpu.reading.tensorstore import FEWEST_ROWS, Gather, open_gather
from kpu.records.images import load_images, load_status
from kpu.records.plan import require_plan
from kpu.records.samples import Samples
from kpu.records.teachers import PublishedTeacher, output_shard
from kpu.records.units import Mask, load_unit, nonfinite_rows, open_committed
from kpu.shards.reader import ShardReader
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.storage.open import open_storage
from kpu.util.lru import LRUCache

_OPEN_SHARDS: Final = 256  # of one cache at most
_KNOWN_UNITS: Final = 2048
_caches: Final = WeakSet["Cache"]()  # the open ones in folders, whose open shards each hold a file descriptor


@dataclass(frozen=True)
class Encoded:
    """Rows as stored: `values` [n, ...] with `value = centre + scale * stored`; centre and scale are float32 [D].

    `codec` is its name; `step` the grid's width in channel standard deviations, None for lossless codecs. With
    `bf16` the values are the bits of bfloat16 numbers as uint16; with `rotated` they count steps along axes, and
    `CachedTeacher.grid` turns them into features. Masked rows hold the fill value.
    """

    values: npt.NDArray[Any]
    centre: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    codec: str
    step: float | None


@dataclass(frozen=True)
class _Unit:
    """What reading needs of a commit record: shards by output, and the masked rows, None if there is none."""

    outputs: dict[str, ShardRecord]
    masked: Mask | None
    status: npt.NDArray[np.uint8] | None


@contextmanager
def _damage_in(cache: str) -> Iterator[None]:
    try:
        yield
    except CorruptError as error:
        raise error.within(cache) from error


class Cache:
    """An open cache. Safe to use from several threads, and to send to other processes.

    Rows are given as a slice, a sequence or array of row numbers, a boolean array over all rows, or one number; what
    comes back always has a leading axis of rows, in the order asked for.
    """

    def __init__(self, storage: Storage, plan: Plan) -> None:
        self.plan = plan
        self.rows = plan.rows
        self.path = storage.url
        self.teachers: Mapping[str, CachedTeacher] = Teachers(storage, plan)
        self.samples = Samples(storage, plan)
        self._storage = storage
        self._units: LRUCache[tuple[str, int], _Unit] = LRUCache(_KNOWN_UNITS)
        local = "://" not in storage.url
        self._shards: LRUCache[tuple[str, str, int], ShardReader] = LRUCache(_kept_open if local else _OPEN_SHARDS)
        if local:
            _caches.add(self)
        self._status: LRUCache[int, npt.NDArray[np.uint8]] = LRUCache(_KNOWN_UNITS)
        self._gathers: LRUCache[str, Gather | None] = LRUCache(_KNOWN_UNITS)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_cache, (self.path,)

    def valid(self, rows: RowSelection | None = None, teacher: str | None = None) -> Mask:
        """Which rows have an image that was decoded and, with `teacher`, finite features from it, bool [n].

        Raises:
            MissingUnitError: a row's unit is not committed, by any teacher or by the one named.
            CorruptError: a file that had to be read is damaged.
        """
        numbers = row_numbers(slice(None) if rows is None else rows, self.rows)
        with _damage_in(self.path):
            if teacher is not None:
                return self._valid(self._teacher(teacher), numbers)
            valid = np.empty(len(numbers), dtype=bool)
            for unit, places, within in by_unit(numbers, self.plan.unit_rows):
                valid[places] = self._status.get(unit, self._load_status)[within] == 0
        return valid

    def read(
        self, teacher: str, output: str, rows: RowSelection, *, masked: Literal["raise", "nan"] = "raise"
    ) -> npt.NDArray[np.float32]:
        """Features, float32 [n, D] or [n, T, D].

        Args:
            teacher: one of `teachers`.
            output: one of its outputs.
            rows: which rows.
            masked: whether a masked row is an error or gives NaN.

        Raises:
            MissingUnitError: a row's unit is not committed.
            MaskedRowError: a row is masked and `masked` is "raise".
            CorruptError: anything that had to be read is not what was committed.
            ConfigError: there is no such teacher or output.
            IndexError: a row is outside the cache.
        """
        if masked not in ("raise", "nan"):
            raise ConfigError(f"masked: expected 'raise' or 'nan', found {masked!r}")
        published = self._teacher(teacher)
        numbers = row_numbers(rows, self.rows)
        with _damage_in(self.path):
            valid = self._valid(published, numbers)
            stored = self._stored(published, output, numbers, valid)
        if masked == "raise" and not valid.all():
            row = int(numbers[np.flatnonzero(~valid)[0]])
            raise MaskedRowError(
                f"row {row} of teacher {teacher!r} is masked ({self._reason(published, row)}); leave it out (see "
                "`Cache.valid`) or read with masked='nan'"
            )
        values = published.grids[output].decode(stored)
        values[~valid] = np.nan
        return values

    def read_encoded(
        self,
        teacher: str,
        output: str,
        rows: RowSelection,
        *,
        out: npt.NDArray[Any] | None = None,
        valid: Mask | None = None,
    ) -> Encoded:
        """Rows as stored, [n, D] or [n, T, D], with the grid that they lie on. Raises as `read`, masked rows aside.

        They are decoded straight into `out`, if it is given; it must be of their shape and dtype, in C order. `valid`
        is what `valid(rows, teacher)` gave, if that is known already.
        """
        published = self._teacher(teacher)
        numbers = row_numbers(rows, self.rows)
        with _damage_in(self.path):
            known = self._valid(published, numbers) if valid is None else valid
            stored = self._stored(published, output, numbers, known, out)
        grid = published.grids[output]
        return Encoded(stored, grid.centre, grid.scale, grid.codec.name, grid.codec.step)

    def image_digests(self, rows: RowSelection) -> npt.NDArray[np.uint8]:
        """BLAKE2b-128 of the encoded image bytes, uint8 [n, 16]. Raises as `valid`."""
        numbers = row_numbers(rows, self.rows)
        digests = np.empty((len(numbers), 16), np.uint8)
        for unit, places, within in by_unit(numbers, self.plan.unit_rows):
            with _damage_in(self.path):
                images = load_images(self._storage, self.plan, unit)
            if images is None:
                raise MissingUnitError(paths.IMAGES, unit)
            digests[places] = images[1].digest[within]
        return digests

    def _teacher(self, name: str) -> PublishedTeacher:
        if name not in self.teachers:
            raise ConfigError(f"teacher {name!r}: expected one of {sorted(self.teachers)} in {self.path}")
        return self.teachers[name].published

    def _stored(
        self,
        teacher: PublishedTeacher,
        output: str,
        numbers: npt.NDArray[np.int64],
        valid: Mask,
        out: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """Stored values [n, ...], in `out` if given, of rows of which `valid` [n] have features."""
        if output not in teacher.layouts:
            raise ConfigError(f"teacher {teacher.spec.name!r} has outputs {list(teacher.layouts)}, not {output!r}")
        array = teacher.layouts[output]
        shape = (len(numbers), *array.item_shape)
        stored = np.empty(shape, array.dtype) if out is None else out
        if stored.shape != shape or stored.dtype != array.dtype or not stored.flags.c_contiguous:
            raise ValueError(
                f"out: expected {array.dtype}{list(shape)} in C order, found {stored.dtype}{list(stored.shape)}"
            )
        if not self._gathered(teacher, output, numbers, stored, valid):
            for unit, places, within in by_unit(numbers, self.plan.unit_rows):
                self._shard(teacher, output, unit).read(within, stored, at=places)
        return stored

    def _valid(self, teacher: PublishedTeacher, numbers: npt.NDArray[np.int64]) -> Mask:
        """Which rows have features of a teacher, bool [n]."""
        valid = np.ones(len(numbers), dtype=bool)
        for unit, places, within in by_unit(numbers, self.plan.unit_rows):
            masked = self._unit(teacher, unit).masked
            if masked is not None:
                valid[places] = ~masked[within]
        return valid

    def _gathered(
        self,
        teacher: PublishedTeacher,
        output: str,
        numbers: npt.NDArray[np.int64],
        stored: npt.NDArray[Any],
        valid: Mask,
    ) -> bool:
        """Whether `stored` could be filled by one gather of all rows `numbers`."""
        if len(numbers) < FEWEST_ROWS:
            return False
        folder, array = f"{paths.teacher(teacher.spec.name)}/{output}", teacher.layouts[output]
        gather = self._gathers.get(folder, lambda _: open_gather(self._storage, folder, array))
        if gather is None:
            return False
        checked = gather.check(numbers, lambda unit: self._open_shard(teacher, output, unit))
        return checked and gather.read(numbers, stored, valid)

    def _unit(self, teacher: PublishedTeacher, unit: int) -> _Unit:
        return self._units.get((teacher.spec.name, unit), lambda _: self._load_unit(teacher, unit))

    def _load_unit(self, teacher: PublishedTeacher, unit: int) -> _Unit:
        record = load_unit(self._storage, self.plan, teacher, unit)
        outputs: dict[str, ShardRecord] = dict(record.outputs)
        if not record.masked and not record.nonfinite:
            return _Unit(outputs, None, None)
        file = paths.commit(paths.teacher(teacher.spec.name), unit)
        status = load_status(self._storage, self.plan, unit, record.masked_digest)
        if status is None:
            raise CorruptError(paths.commit(paths.IMAGES, unit), "is missing", unit=unit)
        masked = (status != ImageStatus.OK) | nonfinite_rows(record, file, len(status))
        return _Unit(outputs, masked, status)

    def _shard(self, teacher: PublishedTeacher, output: str, unit: int) -> ShardReader:
        return self._shards.get((teacher.spec.name, output, unit), lambda _: self._open_shard(teacher, output, unit))

    def _open_shard(self, teacher: PublishedTeacher, output: str, unit: int) -> ShardReader:
        (spec,) = (spec for spec in teacher.spec.outputs if spec.name == output)
        key = output_shard(teacher, spec, unit)
        record = self._unit(teacher, unit).outputs[output]
        name = teacher.spec.name
        return open_committed(self._storage, key, teacher.layouts[output], record, unit=unit, teacher=name)

    def _load_status(self, unit: int) -> npt.NDArray[np.uint8]:
        status = load_status(self._storage, self.plan, unit)
        if status is None:
            raise MissingUnitError(paths.IMAGES, unit)
        return status

    def _reason(self, teacher: PublishedTeacher, row: int) -> str:
        unit, within = divmod(row, self.plan.unit_rows)
        status = self._unit(teacher, unit).status
        code = ImageStatus.OK if status is None else int(status[within])
        return "the teacher gave NaN or infinity" if code == ImageStatus.OK else reason(code)


def open_cache(path: str | os.PathLike[str]) -> Cache:
    """Open the cache in a folder or at an fsspec URL. Takes the same time whatever the number of rows and units.

    Raises:
        NotACacheError: there is none, or one of another format version.
        CorruptError: the plan or group metadata is damaged.
    """
    storage = open_storage(path)
    return Cache(storage, require_plan(storage))


def _kept_open() -> int:
    """How many shards each cache keeps open: together not many more than a quarter of the files a process may open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _OPEN_SHARDS
    return max(1, min(_OPEN_SHARDS, limit // 4 // len(_caches)))
