"""Several caches as one table of rows: what a run trains on, checked before anything is read.

Letters: B rows of a batch, T tokens of a map, C channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kpu.errors import MismatchError
from kpu.format.codecs import QuantGrid
from kpu.format.statistics import Statistics
from kpu.format.teacher import TeacherSpec
from kpu.reading.cache import Cache, open_cache
from kpu.reading.teachers import CachedTeacher
from kpu.util.digests import digest_of
from trainer.data.resident import RowCache, RowNumbers
from trainer.data.shapes import OutputShape, shape_of
from trainer.data.split import validation_mask
from trainer.data.targets import not_among, require

_BLOCK: Final = 2**18  # values that a CPU standardises at once: two passes over a whole batch would leave its cache
Wanted = Mapping[str, Sequence[str]]
"""Outputs by teacher."""


@dataclass(frozen=True)
class TeacherInfo:
    """A teacher as the run knows it: as the first cache that has it describes it; `seed` is that cache's plan's."""

    spec: TeacherSpec
    shapes: dict[str, OutputShape]
    statistics: dict[str, Statistics]
    head: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None
    seed: int = 0


@dataclass(frozen=True)
class Standardiser:
    """From stored values to standardised ones: `x = stored * factor + offset`, per channel or one number for all.

    With `axes` [C, C] it is `x = (unfold(stored) @ axes) * factor + offset` (`kpu.format.codecs.unfold`).
    """

    factor: Tensor
    offset: Tensor
    axes: Tensor | None = None

    def to(self, device: torch.device) -> "Standardiser":
        """The same on a device."""
        axes = None if self.axes is None else self.axes.to(device)
        return Standardiser(self.factor.to(device), self.offset.to(device), axes)

    def __call__(self, stored: Tensor) -> Tensor:
        """float32 of the shape of `stored`, which is on this device."""
        if self.axes is not None:
            steps = (stored >> 1) ^ -(stored & 1)
            return torch.addcmul(self.offset, steps.to(torch.float32) @ self.axes, self.factor)
        values = torch.empty_like(stored, dtype=torch.float32)
        vectors = max(1, (stored.numel() if stored.is_cuda else _BLOCK) // stored.shape[-1])
        for part, into in zip(*(each.flatten(0, -2).split(vectors) for each in (stored, values)), strict=True):
            torch.addcmul(self.offset, into.copy_(part), self.factor, out=into)
        return values


@dataclass(frozen=True)
class HostBatch:
    """Rows as stored, in host memory.

    `rows` int64 [B] are rows of the corpus, `epochs` int64 [B] the epoch of each. `stored` holds one tensor for every
    (teacher, output) and cache `part` (places int64 [n] in the batch, values [n, ...]); masked rows hold 0. `weights`
    float32 [B] by teacher is 0 if a row is masked or its cache lacks the teacher.
    """

    rows: RowNumbers
    epochs: RowNumbers
    parts: tuple[tuple[int, RowNumbers], ...]
    stored: dict[tuple[int, str, str], Tensor]
    weights: dict[str, Tensor]
    images: Tensor | None = None


class Corpus:
    """The caches of a run, their rows one after another.

    Up to `memory` bytes of rows are kept once they were read. With `pinned` batches are read straight into memory that
    a GPU copies from by itself.

    Raises (on opening):
        ConfigError: a teacher, output or layer that is asked for is not there, or a cache is incomplete.
        MismatchError: two caches have different teachers under one name.
    """

    def __init__(
        self, paths: Sequence[str], wanted: Wanted, base: str, *, memory: int = 0, pinned: bool = False
    ) -> None:
        self.caches = [open_cache(path) for path in paths]
        self.wanted = {name: tuple(outputs) for name, outputs in wanted.items()}
        self.starts = np.cumsum([0, *(cache.rows for cache in self.caches)])
        self.rows = int(self.starts[-1])
        self.sources: dict[str, TeacherInfo] = {}
        for cache in self.caches:
            require(base in cache.teachers, f"base: {not_among(base, cache.teachers, f'cache {cache.path}')}")
            for name in self.teachers_of(cache):
                self._admit(cache, cache.teachers[name])
        for name in wanted:
            require(name in self.sources, f"teachers: {not_among(name, self._all_names(), 'the caches')}")
        self._rows, self.pinned = RowCache(memory), pinned

    @property
    def digest(self) -> str:
        """Of the plans of all caches, in order: what the order of rows depends on."""
        return digest_of([cache.plan.digest for cache in self.caches])

    def teachers_of(self, cache: Cache) -> list[str]:
        """The wanted teachers that a cache has, in the order they were asked for."""
        return [name for name in self.wanted if name in cache.teachers]

    def fingerprints(self) -> list[dict[str, Any]]:
        """What identifies each cache and its teachers, for the record kept with the run."""
        return [
            {
                "path": cache.path,
                "plan": cache.plan.digest,
                "rows": cache.rows,
                "teachers": {name: cache.teachers[name].published.fingerprint for name in self.teachers_of(cache)},
            }
            for cache in self.caches
        ]

    def units(self) -> npt.NDArray[np.int64]:
        """First rows of all units, in order, and the number of rows, int64 [units + 1]."""
        starts = [
            np.arange(0, cache.rows, cache.plan.unit_rows, dtype=np.int64) + start
            for cache, start in zip(self.caches, self.starts, strict=False)
        ]
        return np.concatenate([*starts, [self.rows]]).astype(np.int64)

    def validation(self, fraction: float) -> npt.NDArray[np.bool_]:
        """Which rows are for validation, bool [rows]; by key, so that all views of a sample are on one side."""
        if fraction == 0:
            return np.zeros(self.rows, dtype=bool)
        tables = (table for cache in self.caches for table in cache.samples.iter_batches(["key"]))
        return np.concatenate([validation_mask(table["key"].combine_chunks(), fraction) for table in tables])

    def labels(self) -> npt.NDArray[np.int64]:
        """The label of every row as its cache numbers it, int64 [rows], -1 where there is none: null, or below 0."""
        tables = (table for cache in self.caches for table in cache.samples.iter_batches(["label"]))
        found = np.concatenate([table["label"].fill_null(-1).to_numpy() for table in tables]).astype(np.int64)
        return np.maximum(found, -1)

    def standardisers(self, *, raw: bool = False) -> dict[tuple[int, str, str], Standardiser]:
        """By cache, teacher and output; with `raw`, of features as the teacher emits them instead of stored ones."""
        return {
            (number, name, output): _standardiser(
                None if raw else cache.teachers[name].grid(output), self.sources[name].statistics[output]
            )
            for number, cache in enumerate(self.caches)
            for name in self.teachers_of(cache)
            for output in self.wanted[name]
        }

    def fetch(self, rows: RowNumbers, epochs: RowNumbers | None = None) -> HostBatch:
        """Read rows of the corpus. Safe to call from several threads.

        Raises:
            CorruptError: what had to be read is damaged.
        """
        epochs = np.zeros_like(rows) if epochs is None else epochs
        weights = {name: torch.zeros(len(rows)) for name in self.wanted}
        stored: dict[tuple[int, str, str], Tensor] = {}
        parts = tuple(self._parts(rows))
        for number, places in parts:
            cache, within = self.caches[number], rows[places] - self.starts[number]
            for name in self.teachers_of(cache):
                valid = self._rows.valid(cache, name, within)
                weights[name][torch.from_numpy(places)] = torch.from_numpy(valid.astype(np.float32))
                for output in self.wanted[name]:
                    array = cache.teachers[name].published.layouts[output]
                    tensor, values = _empty((len(within), *array.item_shape), array.dtype, pinned=self.pinned)
                    self._rows.take(cache, name, output, within, valid, values)
                    stored[number, name, output] = tensor
        return HostBatch(rows, epochs, parts, stored, weights)

    def _parts(self, rows: RowNumbers) -> Iterator[tuple[int, RowNumbers]]:
        """(cache, places in `rows`) for each cache that has some of the rows."""
        owners = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(owners):
            yield int(number), np.flatnonzero(owners == number)

    def _admit(self, cache: Cache, teacher: CachedTeacher) -> None:
        name = teacher.name
        for output in self.wanted[name]:
            require(
                output in teacher.outputs,
                f"cache {cache.path}: teacher {name!r} has outputs {sorted(teacher.outputs)}, not {output!r}; "
                "extract it with that output under a new name, or leave it out",
            )
        done = int(np.count_nonzero(teacher.committed()))
        require(
            done == cache.plan.units,
            f"cache {cache.path}: teacher {name!r}: expected all {cache.plan.units} units, found {done}; complete it "
            "with the same `kpu-cache extract` command",
        )
        existing = self.sources.get(name)
        if existing is None:
            shapes = {output: shape_of(teacher.outputs[output]) for output in self.wanted[name]}
            self.sources[name] = TeacherInfo(
                teacher.spec, shapes, dict(teacher.statistics), teacher.head, cache.plan.seed
            )
        elif differing := existing.spec.model_differences(teacher.spec):
            raise MismatchError(
                f"cache {cache.path}: teacher {name!r}: expected the same model in every cache, found another "
                f"{', '.join(sorted(differing))}; extract both with the same teacher, or name them apart"
            )

    def _all_names(self) -> list[str]:
        return sorted({name for cache in self.caches for name in cache.teachers})


def _standardiser(grid: QuantGrid | None, statistics: Statistics) -> Standardiser:
    """Where the cache's own grid is that of the statistics, the factor is its step, the same for all channels."""
    std = statistics.std
    if grid is None:
        return Standardiser(*(torch.from_numpy(a.astype(np.float32)) for a in (1 / std, -statistics.centre / std)))
    axes = None if grid.axes is None else torch.from_numpy(grid.axes)
    step = grid.codec.step
    if step is not None and np.array_equal(grid.middle, statistics.centre.astype(np.float32)):
        expected = np.maximum(step * std, np.finfo(np.float32).tiny).astype(np.float32)
        if np.array_equal(grid.scale, expected):
            offset = torch.from_numpy(-grid.offset).float() * step
            return Standardiser(torch.tensor(step, dtype=torch.float32), offset, axes)
    factor = torch.from_numpy((grid.scale / std).astype(np.float32))
    offset = torch.from_numpy(((grid.centre - statistics.centre) / std).astype(np.float32))
    return Standardiser(factor, offset, axes)


def _empty(shape: tuple[int, ...], dtype: "np.dtype[Any]", *, pinned: bool) -> tuple[Tensor, npt.NDArray[Any]]:
    """A tensor for stored values and the same memory for NumPy; uint16 are the bits of bfloat16."""
    bits = np.dtype(np.int16) if dtype == np.uint16 else dtype
    if pinned:
        tensor = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, bits)).dtype, pin_memory=True)
    else:  # NumPy asks for huge pages, torch does not
        tensor = torch.from_numpy(np.empty(shape, bits))
    return tensor if bits == dtype else tensor.view(torch.bfloat16), tensor.numpy().view(dtype)
