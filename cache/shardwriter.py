"""The layout of an array, and one unit of it as the bytes of one shard; `cache.shards` says what is in those."""

import hashlib
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cache.chunks import crc, encode_chunk, use_one_thread
from cache.digests import DIGEST_BYTES

ABSENT: Final = 2**64 - 1  # offset and size of a chunk that is not there
_BATCH_BYTES: Final = 1 << 20  # decoded bytes of chunks that one task encodes


@dataclass(frozen=True)
class ArrayLayout:
    """Shape and storage of one array: [rows, *item_shape], one shard a unit, `chunk_rows` rows an inner chunk."""

    rows: int
    unit_rows: int
    chunk_rows: int
    item_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: int | float
    compressed: bool

    def __post_init__(self) -> None:
        smallest = min(self.rows, self.unit_rows, self.chunk_rows, *self.item_shape)
        if smallest < 1 or self.unit_rows % self.chunk_rows:
            raise ValueError(f"unit_rows must be a multiple of chunk_rows, and no dimension empty: {self}")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.item_shape)

    @property
    def shard_shape(self) -> tuple[int, ...]:
        return (self.unit_rows, *self.item_shape)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.chunk_rows, *self.item_shape)

    @property
    def chunks_per_shard(self) -> int:
        return self.unit_rows // self.chunk_rows

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of one decoded chunk."""
        return self.chunk_rows * self.row_bytes

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one decoded row."""
        return prod(self.item_shape) * self.dtype.itemsize

    def valid_rows(self, unit: int) -> int:
        """Rows of the array that lie in `unit`."""
        return max(0, min(self.unit_rows, self.rows - unit * self.unit_rows))


@dataclass(frozen=True)
class Shard:
    """The bytes of one shard and the seal inside them, as hexadecimal digits."""

    data: bytes
    seal: str


def encode_shard(values: npt.NDArray[Any], layout: ArrayLayout, *, pool: Executor | None = None) -> Shard:
    """Encode one unit.

    Args:
        values: [n, *item_shape] of the layout's dtype, 1 <= n <= unit_rows.
        layout: of the array. A partial last chunk is padded with its fill.
        pool: compresses chunks in its threads; the bytes are the same without.

    Raises:
        ValueError: shape or dtype differ from the layout.
    """
    rows = len(values) if values.ndim else 0
    if values.shape[1:] != layout.item_shape or values.dtype != layout.dtype or not 1 <= rows <= layout.unit_rows:
        raise ValueError(f"values {values.dtype}{list(values.shape)} do not fit {layout}")
    use_one_thread()
    step = layout.chunk_rows
    if rows % step:
        padding = np.full((step - rows % step, *layout.item_shape), layout.fill, layout.dtype)
        values = np.concatenate([values, padding])
    chunks = np.ascontiguousarray(values).reshape(-1, *layout.chunk_shape)
    seal = hashlib.blake2b(digest_size=DIGEST_BYTES)
    encoded: list[bytes] = []
    batch = max(1, _BATCH_BYTES // layout.chunk_bytes)
    batches = [chunks[first : first + batch] for first in range(0, len(chunks), batch)]
    for parts in (pool.map if pool else map)(partial(_encode_chunks, compressed=layout.compressed), batches):
        for part in parts:
            seal.update(part)
        encoded += parts

    index = np.full((layout.chunks_per_shard, 2), ABSENT, dtype="<u8")
    sizes = np.fromiter(map(len, encoded), dtype="<u8", count=len(encoded))
    index[: len(encoded), 1] = sizes
    index[: len(encoded), 0] = np.cumsum(sizes) - sizes
    raw_index = index.tobytes()
    seal.update(raw_index)
    return Shard(b"".join([*encoded, seal.digest(), raw_index, crc(raw_index)]), seal.hexdigest())


def _encode_chunks(chunks: npt.NDArray[Any], *, compressed: bool) -> list[bytes]:
    return [encode_chunk(chunk, compressed=compressed) for chunk in chunks]
