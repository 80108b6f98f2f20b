"""One unit of one array as the bytes of one object, and fast checked reads of its rows.

As a Zarr v3 `sharding_indexed` object:

    chunk 0 | chunk 1 | ... | seal (16 bytes) | index (16 bytes a chunk) | crc32c of the index (4 bytes)

Each chunk ends with its own crc32c; its 16 bytes in the index are its offset and size. The seal is BLAKE2b-128 of all
chunk bytes and the index. To Zarr it is unreferenced space inside the shard, which the format allows; to us it binds
the shard to the commit record that repeats it: two shards with chunks of equal sizes have equal indices, and only the
seal tells them apart.

As a tar:

    header | row, padded to 512 bytes | header | row | ... | two blocks of zeros | seal | index | crc32c of the index

To a tar's reader the file ends with the zeros. The 16 bytes of a row in the index are the offset of its bytes, their
number (4 bytes) and their crc32c (4 bytes); all bits are set for a masked row, which has no member.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kpu.errors import CorruptError
from kpu.format.commits import ShardRecord
from kpu.shards.chunk import CRC_BYTES, is_intact, use_one_thread
from kpu.shards.index import Index, parse_index
from kpu.shards.layout import ArrayLayout
from kpu.storage.base import Handle
from kpu.util.cores import usable_cores
from kpu.util.digests import DIGEST_BYTES, digest

_PARALLEL_BYTES: Final = 4 << 20  # decoded bytes from which threads pay on a local disk
_THREADS: Final = 16


def open_shard(
    handle: Handle, layout: ArrayLayout, record: ShardRecord, *, file: str, unit: int, teacher: str | None
) -> "ShardReader":
    """Read the tail of a shard once and compare it with the commit record.

    Raises:
        CorruptError: size, index checksum, seal or index are not those of the committed shard.
    """
    if handle.size != record.bytes:
        reason = f"holds {handle.size} bytes, {record.bytes} were committed"
        raise CorruptError(file, reason, unit=unit, teacher=teacher)
    use_one_thread()
    return ShardReader(handle, layout, record.seal, file=file, unit=unit, teacher=teacher)


class _Wanted(NamedTuple):
    """One chunk, where it lies, and what is wanted of it: (row in the chunk, target)."""

    chunk: int
    start: int
    end: int
    rows: list[tuple[int, int]]


@dataclass(slots=True)
class _Span:
    """Chunks that are fetched with one read."""

    start: int
    end: int
    chunks: list[_Wanted]


class ShardReader:
    """Checked reads of one committed shard; safe to use from many threads."""

    def __init__(
        self, handle: Handle, layout: ArrayLayout, seal: str, *, file: str, unit: int, teacher: str | None
    ) -> None:
        self._handle, self._layout, self._seal = handle, layout, seal
        self._file, self._unit, self._teacher = file, unit, teacher
        self.rows: Final = layout.valid_rows(unit)
        """Valid rows of this unit."""
        self.index: Final = self._load_index()
        """Where its chunks lie."""

    def read(
        self, rows: npt.NDArray[np.int64], out: npt.NDArray[Any], *, at: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Fill `out` [n, *item_shape] with the stored values of `rows` [n], counted within the unit.

        Rows come in any order, with repeats. The crc32c of every touched chunk is checked. With `at` [n], row
        `rows[i]` goes to `out[at[i]]` instead of `out[i]`, and `out` may be longer.

        Raises:
            CorruptError: bytes of a touched chunk are not those that were written.
            IndexError: a row is not in this unit, or its place not in `out`.
            ValueError: `out` has another dtype, shape or memory order than the layout's C order.
        """
        layout = self._layout
        fits = out.shape[1:] == layout.item_shape and (at is not None or len(out) == len(rows))
        if out.dtype != layout.dtype or not fits or not out.flags.c_contiguous:
            raise ValueError(f"out {out.dtype}{list(out.shape)} does not fit {len(rows)} rows of {layout}")
        if not len(rows):
            return
        # Plain integers from here on: a call often wants one row, and each NumPy operation costs as much as many rows.
        wanted: list[int] = rows.tolist()
        targets: list[int] = list(range(len(wanted))) if at is None else at.tolist()
        if at is not None and not 0 <= min(targets) <= max(targets) < len(out):
            raise IndexError(f"at: expected indices of {len(out)} rows of out, found {min(targets)} to {max(targets)}")
        pairs = sorted(zip(wanted, targets, strict=True))
        if pairs[0][0] < 0 or pairs[-1][0] >= self.rows:
            raise IndexError(f"{self._file}: rows {pairs[0][0]} to {pairs[-1][0]} of a unit that has {self.rows}")
        spans = self._spans(pairs, out)
        threads = 1 if len(spans) < 2 else self._threads(len(spans), len(pairs) * layout.row_bytes)
        if threads == 1:
            self._read_spans(spans, out)
        else:
            jobs = [_pool().submit(self._read_spans, spans[k::threads], out) for k in range(threads)]
            wait(jobs)  # also where one fails: nobody writes into `out` afterwards
            for job in jobs:
                job.result()

    def verify(self) -> None:
        """Read all the bytes; recompute the seal and every crc32c; check the header of every chunk.

        Raises:
            CorruptError: any byte is not the one that was written, or a chunk is none of this array.
        """
        data, index = self._fetch(0, self._handle.size), self.index
        for chunk, (start, end) in enumerate(zip(index.starts, index.ends, strict=True)):
            if start < 0:
                continue
            raw = data[start:end]
            if not index.is_intact(chunk, raw):
                raise self._corrupt(f"chunk {chunk} does not match its crc32c")
            try:
                index.check_header(raw)
            except ValueError as error:
                raise self._corrupt(f"chunk {chunk} cannot be decoded ({error})") from None
        payload = self._handle.size - self._tail_bytes
        if self._check_tail(data[payload:]) != index:
            raise self._corrupt("changed while it was read")
        view = memoryview(data)
        if digest(view[:payload], view[payload + DIGEST_BYTES : -CRC_BYTES]) != self._seal:
            raise self._corrupt("does not match its seal")

    @property
    def _tail_bytes(self) -> int:
        return DIGEST_BYTES + 16 * self._layout.chunks_per_shard + CRC_BYTES

    def _load_index(self) -> Index:
        if self._handle.size < self._tail_bytes:
            raise self._corrupt(f"holds {self._handle.size} bytes, too few for its index")
        return self._check_tail(self._fetch(self._handle.size - self._tail_bytes, self._tail_bytes))

    def _check_tail(self, tail: bytes) -> Index:
        """Check the seal and the index."""
        if not is_intact(tail[DIGEST_BYTES:]):
            raise self._corrupt("the index does not match its crc32c")
        if tail[:DIGEST_BYTES].hex() != self._seal:
            raise self._corrupt("is not the shard that was committed (its seal differs)")
        raw, payload = tail[DIGEST_BYTES:-CRC_BYTES], self._handle.size - len(tail)
        index = parse_index(raw, self._layout, self.rows, payload)
        if index is None:
            raise self._corrupt("the index does not describe the chunks of this unit")
        return index

    def _spans(self, pairs: list[tuple[int, int]], out: npt.NDArray[Any]) -> list[_Span]:
        """Group sorted (row, target) by chunk, and chunks that lie close together into spans to be fetched at once.

        Rows without a chunk are filled here.
        """
        chunk_rows, index, longest = self._layout.chunk_rows, self.index, self._handle.fetch_bytes
        starts, ends = index.starts, index.ends
        spans: list[_Span] = []
        current = end = -1
        for row, target in pairs:
            chunk = row // chunk_rows
            if starts[chunk] < 0:
                out[target] = self._layout.fill
                continue
            if chunk != current:
                current, start, previous, end = chunk, starts[chunk], end, ends[chunk]
                if not spans or end - spans[-1].start > longest or start - previous > longest // 16:
                    spans.append(_Span(start, end, []))
                spans[-1].end = end
                wanted: list[tuple[int, int]] = []
                spans[-1].chunks.append(_Wanted(chunk, start, end, wanted))
            wanted.append((row - chunk * chunk_rows, target))
        return spans

    def _threads(self, spans: int, decoded_bytes: int) -> int:
        """How many threads share a read: on a network one a span, to overlap the round trips; else one a core."""
        if self._handle.remote:
            return min(spans, _THREADS)
        return min(spans, _THREADS, usable_cores()) if decoded_bytes >= _PARALLEL_BYTES else 1

    def _read_spans(self, spans: Sequence[_Span], out: npt.NDArray[Any]) -> None:
        """Fetch, check, decode, and put each row where it belongs in `out`."""
        one_row = self._layout.chunk_rows == 1
        scratch = out if one_row else np.empty(self._layout.chunk_shape, self._layout.dtype)
        for span in spans:
            data = self._fetch(span.start, span.end - span.start)
            for chunk, start, end, wanted in span.chunks:
                raw = data if len(span.chunks) == 1 else data[start - span.start : end - span.start]
                if not self.index.is_intact(chunk, raw):
                    raise self._corrupt(f"chunk {chunk} does not match its crc32c")
                if one_row:
                    first = wanted[0][1]
                    self._decode(chunk, raw, out[first : first + 1])
                    for _, target in wanted[1:]:
                        out[target] = out[first]
                elif len(wanted) == 1:
                    self._decode(chunk, raw, scratch)
                    out[wanted[0][1]] = scratch[wanted[0][0]]
                else:
                    self._decode(chunk, raw, scratch)
                    origins, targets = zip(*wanted, strict=True)
                    out[list(targets)] = scratch[list(origins)]

    def _decode(self, chunk: int, raw: bytes, target: npt.NDArray[Any]) -> None:
        try:
            self.index.decode(raw, target)
        except ValueError as error:
            raise self._corrupt(f"chunk {chunk} cannot be decoded ({error})") from None

    def _fetch(self, offset: int, length: int) -> bytes:
        try:
            return self._handle.read(offset, length)
        except CorruptError as error:
            raise self._corrupt(error.reason) from None

    def _corrupt(self, reason: str) -> CorruptError:
        return CorruptError(self._file, reason, unit=self._unit, teacher=self._teacher)


@cache
def _pool_of(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix=f"kpu-read-{process}")


def _pool() -> ThreadPoolExecutor:
    """The threads of this process: those of a parent do not survive a fork."""
    return _pool_of(os.getpid())
