"""Rows that were read once, kept as stored in memory while there is room: every further epoch is a gather."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kpu.reading.cache import Cache
from kpu.util.memory import available_memory

RowNumbers = npt.NDArray[np.int64]

_SHARE: Final = 0.4  # of the memory that is free when a run begins


class RowCache:
    """Stored rows of outputs, as many whole outputs as fit into `memory` bytes, first come, first served.

    Rows that share a chunk, as those of vectors do, are kept together: to read one is to decode them all.
    Safe to use from several threads: a row may be read twice, but is never seen half written.
    """

    def __init__(self, memory: int) -> None:
        self._left, self._lock = memory, Lock()
        self._kept: dict[tuple[str, str, str], _Room | None] = {}

    def take(
        self,
        cache: Cache,
        teacher: str,
        output: str,
        rows: RowNumbers,
        valid: npt.NDArray[np.bool_],
        out: npt.NDArray[Any],
    ) -> None:
        """Fill `out` [n, ...] with rows as stored; `valid` [n] is what `valid` gave. Raises as `Cache.read_encoded`."""
        array = cache.teachers[teacher].published.layouts[output]
        shape = (cache.rows, *array.item_shape)
        room = self._room((cache.path, teacher, output), shape, array.dtype, array.chunk_rows, optional=True)
        if room is None:
            cache.read_encoded(teacher, output, rows, out=out, valid=valid)
            return

        def read(missing: RowNumbers) -> npt.NDArray[Any]:
            return cache.read_encoded(teacher, output, missing, valid=self.valid(cache, teacher, missing)).values

        room.take(rows, read, out)

    def valid(self, cache: Cache, teacher: str, rows: RowNumbers) -> npt.NDArray[np.bool_]:
        """As `Cache.valid`."""
        room = self._room(
            (cache.path, teacher, ""), (cache.rows,), np.dtype(bool), cache.plan.unit_rows, optional=False
        )
        assert room is not None
        valid = np.empty(len(rows), dtype=bool)
        room.take(rows, lambda missing: cache.valid(missing, teacher), valid)
        return valid

    def _room(
        self,
        key: tuple[str, str, str],
        shape: tuple[int, ...],
        dtype: "np.dtype[Any]",
        together: int,
        *,
        optional: bool,
    ) -> "_Room | None":
        with self._lock:
            if key not in self._kept:
                needed = math.prod(shape) * dtype.itemsize
                fits = not optional or needed <= self._left
                room = _Room(np.empty(shape, dtype), np.zeros(shape[0], dtype=bool), together) if fits else None
                self._kept[key] = room
                self._left -= needed if fits and optional else 0
            return self._kept[key]


@dataclass(frozen=True)
class _Room:
    """Values of all rows, and which of them are known; so many rows at a time, from a multiple of it on, get known."""

    values: npt.NDArray[Any]
    known: npt.NDArray[np.bool_]
    together: int

    def take(self, rows: RowNumbers, read: Callable[[RowNumbers], npt.NDArray[Any]], out: npt.NDArray[Any]) -> None:
        chunks = np.unique(rows[~self.known[rows]] // self.together)
        if chunks.size:
            missing = (chunks[:, None] * self.together + np.arange(self.together)).ravel()
            missing = missing[missing < len(self.known)]
            self.values[missing] = read(missing)
            self.known[missing] = True
        np.take(self.values, rows, axis=0, out=out, mode="clip")  # by default NumPy would fill a copy first


def free_memory(processes: int = 1) -> int:
    """Bytes that rows may take in each of so many processes of this machine: a share of what is free now.

    0 if the system does not say.
    """
    return int(_SHARE * (available_memory() or 0) / processes)
