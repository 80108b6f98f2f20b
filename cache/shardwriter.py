"""The layout of an array, and one unit of it as the bytes of one object; `cache.shards` says what is in those."""

import hashlib
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cache import layout as keys
from cache.chunks import Packing, crc, encode_chunk, use_one_thread
from cache.digests import DIGEST_BYTES
from cache.members import TAR_BLOCK, TAR_CRC_SHIFT, TAR_END, encode_member, is_fill, member_name, tar_header

ABSENT: Final = 2**64 - 1  # offset and size of a chunk that is not there
_BATCH_BYTES: Final = 1 << 20  # decoded bytes of chunks that one task encodes


@dataclass(frozen=True)
class ArrayLayout:
    """Shape and storage of one array: [rows, *item_shape], one shard a unit, `chunk_rows` rows an inner chunk.

    With `member` a shard is a tar instead, of one file `<row>.<member>` a row; a chunk is one row then.
    """

    rows: int
    unit_rows: int
    chunk_rows: int
    item_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: int | float
    packing: Packing
    member: str | None = None

    def __post_init__(self) -> None:
        smallest = min(self.rows, self.unit_rows, self.chunk_rows, *self.item_shape)
        if self.member is not None and self.chunk_rows != 1:
            raise ValueError(f"a tar holds one row a member: {self}")
        if self.packing not in (("plain", "gzip") if self.member is not None else ("plain", "bytes", "bits")):
            raise ValueError(f"packing {self.packing} is not for this format: {self}")
        if smallest < 1 or self.unit_rows % self.chunk_rows:
            raise ValueError(f"unit_rows must be a multiple of chunk_rows, and no dimension empty: {self}")

    @property
    def gzipped(self) -> bool:
        """Whether the members of a tar are."""
        return self.packing == "gzip"

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

    @property
    def most_bytes(self) -> int:
        """Bytes that no encoded shard of this array exceeds: of its values twice over, and of what frames each row."""
        return self.unit_rows * (2 * self.row_bytes + 4096) + 2**20

    def key(self, folder: str, unit: int) -> str:
        """The object that holds `unit` of the array in `folder`."""
        return keys.shard(folder, unit, len(self.item_shape)) if self.member is None else keys.tar(folder, unit)

    def valid_rows(self, unit: int) -> int:
        """Rows of the array that lie in `unit`."""
        return max(0, min(self.unit_rows, self.rows - unit * self.unit_rows))


@dataclass(frozen=True)
class Shard:
    """The bytes of one shard and the seal inside them, as hexadecimal digits."""

    data: bytes
    seal: str


def encode_shard(values: npt.NDArray[Any], layout: ArrayLayout, unit: int, *, pool: Executor | None = None) -> Shard:
    """Encode one unit.

    Args:
        values: [n, *item_shape] of the layout's dtype, 1 <= n <= unit_rows.
        layout: of the array. A partial last chunk is padded with its fill.
        unit: its number, of which only tars make use: they name their rows.
        pool: compresses chunks in its threads; the bytes are the same without.

    Raises:
        ValueError: shape or dtype differ from the layout.
    """
    rows = len(values) if values.ndim else 0
    if values.shape[1:] != layout.item_shape or values.dtype != layout.dtype or not 1 <= rows <= layout.unit_rows:
        raise ValueError(f"values {values.dtype}{list(values.shape)} do not fit {layout}")
    if layout.member is not None:
        return encode_tar(values, layout, unit, pool)
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
    for parts in (pool.map if pool else map)(partial(_encode_chunks, packing=layout.packing), batches):
        for part in parts:
            seal.update(part)
        encoded += parts

    index = np.full((layout.chunks_per_shard, 2), ABSENT, dtype="<u8")
    sizes = np.fromiter(map(len, encoded), dtype="<u8", count=len(encoded))
    index[: len(encoded), 1] = sizes
    index[: len(encoded), 0] = np.cumsum(sizes) - sizes
    return _seal(seal, encoded, index)


def encode_tar(values: npt.NDArray[Any], layout: ArrayLayout, unit: int, pool: Executor | None) -> Shard:
    """Encode one unit as a tar; see `encode_shard`. Rows that hold nothing but the fill have no member."""
    assert layout.member is not None
    first = unit * layout.unit_rows
    present = [row for row in range(len(values)) if not is_fill(values[row], layout.fill)]
    payloads = (pool.map if pool else map)(
        partial(encode_member, compressed=layout.gzipped), (values[row] for row in present)
    )
    parts: list[bytes] = []
    index = np.full((layout.chunks_per_shard, 2), ABSENT, dtype="<u8")
    offset = 0
    for row, payload in zip(present, payloads, strict=True):
        header = tar_header(member_name(first + row, layout.member, compressed=layout.gzipped), len(payload))
        padding = bytes(-len(payload) % TAR_BLOCK)
        parts += [header, payload, padding]
        index[row] = offset + len(header), len(payload) | int.from_bytes(crc(payload), "little") << TAR_CRC_SHIFT
        offset += len(header) + len(payload) + len(padding)
    parts.append(TAR_END)
    seal = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        seal.update(part)
    return _seal(seal, parts, index)


def _seal(seal: "hashlib.blake2b", parts: list[bytes], index: npt.NDArray[np.uint64]) -> Shard:
    """Append the tail; `seal` has seen the parts."""
    raw_index = index.tobytes()
    seal.update(raw_index)
    return Shard(b"".join([*parts, seal.digest(), raw_index, crc(raw_index)]), seal.hexdigest())


def _encode_chunks(chunks: npt.NDArray[Any], packing: Packing) -> list[bytes]:
    return [encode_chunk(chunk, packing) for chunk in chunks]
