"""Where the chunks of a shard lie, and how their bytes are checked and decoded: what Zarr shards and tars differ in."""

from array import array
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kpu.shards.chunk import BLOSC_SHUFFLE, CRC_BYTES, check_blosc_header, crc, decode_chunk, is_intact
from kpu.shards.layout import ABSENT, ArrayLayout
from kpu.shards.tar import TAR_BLOCK, TAR_CRC_SHIFT, TAR_END, decode_member

_SIZE: Final = 2**TAR_CRC_SHIFT - 1


@dataclass(frozen=True)
class Index:
    """Chunk i lies in bytes `starts[i]` to `ends[i]`; both are -1 where there is none, and its row holds the fill."""

    layout: ArrayLayout
    starts: "array[int]"
    ends: "array[int]"

    def is_intact(self, chunk: int, raw: bytes) -> bool:
        """Whether `raw` matches the checksum of the chunk, which Zarr keeps at its end."""
        del chunk
        return is_intact(raw)

    def check_header(self, raw: bytes) -> None:
        """Check an intact chunk as far as that takes no decoding.

        Raises:
            ValueError: its header promises another chunk.
        """
        if self.layout.packing in BLOSC_SHUFFLE:
            check_blosc_header(raw, len(raw) - CRC_BYTES, self.layout.chunk_bytes, self.layout.dtype.itemsize)

    def decode(self, raw: bytes, target: npt.NDArray[Any]) -> None:
        """Decode an intact chunk into the C-contiguous `target`.

        Raises:
            ValueError: it is no chunk of this layout.
        """
        decode_chunk(raw, target, self.layout.packing)


@dataclass(frozen=True)
class TarIndex(Index):
    """The same for a tar, whose index holds the members' checksums."""

    checksums: "array[int]"

    def is_intact(self, chunk: int, raw: bytes) -> bool:
        """Whether `raw` matches the checksum of the chunk."""
        return int.from_bytes(crc(raw), "little") == self.checksums[chunk]

    def decode(self, raw: bytes, target: npt.NDArray[Any]) -> None:
        """Decode an intact member into a target of one row; see `Index.decode`."""
        decode_member(raw, target[0], compressed=self.layout.gzipped)


def parse_index(raw: bytes, layout: ArrayLayout, rows: int, payload: int) -> Index | None:
    """The index of a shard of `rows` rows and `payload` bytes before its tail; None if it cannot be that."""
    words = np.frombuffer(raw, dtype="<u8").reshape(-1, 2)
    present = -(-rows // layout.chunk_rows)
    if not (words[present:] == ABSENT).all():
        return None
    words = words[:present]
    return _tar_index(words, layout, payload) if layout.member is not None else _zarr_index(words, layout, payload)


def _zarr_index(words: npt.NDArray[np.uint64], layout: ArrayLayout, payload: int) -> Index | None:
    offsets, sizes = words.T.astype(np.int64)  # an absurd size turns negative here
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    sound = (
        (sizes > CRC_BYTES).all()
        and (offsets == bounds[:-1]).all()
        and bounds[-1] == payload
        and (layout.packing != "plain" or (sizes == layout.chunk_bytes + CRC_BYTES).all())
    )
    return Index(layout, _plain(bounds[:-1]), _plain(bounds[1:])) if sound else None


def _tar_index(words: npt.NDArray[np.uint64], layout: ArrayLayout, payload: int) -> TarIndex | None:
    there = (words != ABSENT).all(axis=1)
    if (words[~there] != ABSENT).any():
        return None
    starts = words[:, 0].astype(np.int64)
    ends = starts + (words[:, 1] & np.uint64(_SIZE)).astype(np.int64)
    inside, outside = starts[there], ends[there]
    padded = -(-outside // TAR_BLOCK) * TAR_BLOCK
    befores = np.concatenate([[0], padded[:-1]]) if len(padded) else padded
    last = int(padded[-1]) if len(padded) else 0
    if not ((inside - befores >= TAR_BLOCK).all() and (outside > inside).all() and last + len(TAR_END) == payload):
        return None
    starts[~there] = ends[~there] = -1
    checksums = (words[:, 1] >> np.uint64(TAR_CRC_SHIFT)).astype(np.int64)
    return TarIndex(layout, _plain(starts), _plain(ends), _plain(checksums))


def _plain(values: npt.NDArray[np.int64]) -> "array[int]":
    """Compact, and gives plain integers."""
    return array("q", values.tobytes())
