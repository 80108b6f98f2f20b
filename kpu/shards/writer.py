"""The layout of an array, and one unit of it as the bytes of one object; `kpu.shards.reader` says what is in those."""

import hashlib
from concurrent.futures import Executor
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kpu.format.codecs import Packing
from kpu.shards.chunk import crc, encode_chunk, use_one_thread
from kpu.shards.layout import ABSENT, ArrayLayout, Shard
from kpu.shards.tar import TAR_BLOCK, TAR_CRC_SHIFT, TAR_END, encode_member, is_fill, member_name, tar_header
from kpu.util.digests import DIGEST_BYTES

_BATCH_BYTES: Final = 1 << 20  # decoded bytes of chunks that one task encodes


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
