"""Many rows of one array at once, by tensorstore, whose threads do not hold Python's lock.

A chunk costs the reader of `kpu.shards.reader` half the processor time, but most of that with the lock held: beside a
loader of many threads, a thread that launches work on a GPU comes to a standstill. So tensorstore reads where cores are
plentiful, and the other reader where they are few, in tars, in object stores, and whenever anything looks wrong: it
says what. Each shard is compared with its commit record before it is read here for the first time, and so is the header
of each chunk with what it must say: tensorstore gives blosc as much memory as that asks for.
"""

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kpu.errors import CorruptError
from kpu.shards.chunk import BLOSC_HEADER, BLOSC_SHUFFLE, CRC_BYTES, check_blosc_header
from kpu.shards.index import Index
from kpu.shards.layout import ArrayLayout
from kpu.shards.reader import ShardReader
from kpu.storage.base import Storage
from kpu.storage.local import LocalStorage
from kpu.util.cores import usable_cores
from kpu.util.lru import LRUCache

FEWEST_CORES: Final = 4
FEWEST_ROWS: Final = 16  # below, starting it costs more than it gains
_MEMORY: Final = 64 << 20  # for the indices of shards
_INDEX_BYTES: Final = 16  # of one chunk
_READS: Final = 16  # files at a time


class Gather:
    """Rows of an array below `folder`; safe to use from several threads, but not in a fork."""

    def __init__(self, storage: LocalStorage, folder: str, layout: ArrayLayout) -> None:
        self._storage, self._folder, self._layout = storage, folder, layout
        self._fill = np.asarray(layout.fill, layout.dtype)
        self._has_headers = layout.packing in BLOSC_SHUFFLE
        # What is checked at once, and whether it was. The memory of a flag is taken when it is set.
        self._piece_rows = layout.chunk_rows if self._has_headers else layout.unit_rows
        self._checked = np.zeros(-(-layout.rows // self._piece_rows), bool)
        self._indices: LRUCache[int, Index] = LRUCache(max(16, _MEMORY // (_INDEX_BYTES * layout.chunks_per_shard)))
        self._engine = _engine()
        store = {"driver": "file", "path": f"{storage.url}/{folder}"}
        self._array = self._engine.library.open(
            {"driver": "zarr3", "kvstore": store, "recheck_cached_data": False},
            read=True,
            context=self._engine.context,
        ).result()

    def check(self, rows: npt.NDArray[np.int64], open_shard: Callable[[int], ShardReader]) -> bool:
        """Check what was not read before of the shards and chunks of `rows` [n]; False if a header is wrong.

        `open_shard` opens the shard of a unit, compared with its commit record. Raises what that raises.
        """
        pieces = rows // self._piece_rows
        fresh = pieces[~self._checked[pieces]]
        if not fresh.size:
            return True
        each = self._layout.unit_rows // self._piece_rows
        by_unit: defaultdict[int, list[int]] = defaultdict(list)
        for piece in set(fresh.tolist()):
            by_unit[piece // each].append(piece % each)
        for unit, chunks in by_unit.items():
            index = self._indices.get(unit, lambda unit: open_shard(unit).index)
            if self._has_headers and not self._has_sound_headers(unit, chunks, index):
                return False
        self._checked[fresh] = True
        return True

    def _has_sound_headers(self, unit: int, chunks: list[int], index: Index) -> bool:
        decoded, itemsize = self._layout.chunk_bytes, self._layout.dtype.itemsize
        try:
            handle = self._storage.open(self._layout.key(self._folder, unit))
            for chunk in chunks:
                start = index.starts[chunk]
                stored = index.ends[chunk] - start - CRC_BYTES
                check_blosc_header(handle.read(start, min(stored, BLOSC_HEADER.size)), stored, decoded, itemsize)
        except (ValueError, CorruptError, FileNotFoundError):  # the other reader says which
            return False
        return True

    def read(self, rows: npt.NDArray[np.int64], out: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> bool:
        """Fill the C-contiguous `out` [n, ...] with `rows` [n] as stored; False if that did not go as it should.

        A chunk or shard that is not there reads as the fill value, which no row of `valid` [n] holds.
        """
        if self._engine.is_of_another_process:
            return False
        try:
            self._engine.library.array(out).write(self._array[rows]).result()
        except (ValueError, OSError):  # how tensorstore reports anything, a wrong checksum included
            return False
        first = out.reshape(len(out), -1)[:, 0]
        absent = np.isnan(first) if np.isnan(self._fill) else first == self._fill
        return not (absent & valid).any()


def open_gather(storage: Storage, folder: str, layout: ArrayLayout) -> Gather | None:
    """For an array of this layout; None if the other reader serves it better, or alone."""
    if layout.member is not None or not isinstance(storage, LocalStorage) or usable_cores() < FEWEST_CORES:
        return None
    return None if _engine().is_of_another_process else Gather(storage, folder, layout)


@dataclass(frozen=True)
class _Engine:
    """The library, and the threads and memory that all arrays share.

    Threads do not survive a fork: to a fork of a process that used them, a call would never return.
    """

    library: Any
    context: Any
    process: int

    @property
    def is_of_another_process(self) -> bool:
        return self.process != os.getpid()


@cache
def _engine() -> _Engine:
    import tensorstore  # takes a moment to load

    shared = {
        "cache_pool": {"total_bytes_limit": _MEMORY},
        "data_copy_concurrency": {"limit": max(1, usable_cores() // 2)},  # the others are for who waits for the rows
        "file_io_concurrency": {"limit": _READS},
    }
    return _Engine(tensorstore, tensorstore.Context(shared), os.getpid())
