"""One inner chunk of a shard: [transpose ->] little-endian bytes [-> blosc] -> crc32c, in the calling thread.

How a chunk is packed: `plain` as it is; `bytes` by blosc with its bytes shuffled; `bits` by blosc with its bits
shuffled, channels first. In tars, which have no such chunks, a row is `plain` or `gzip`.
"""

import struct
from typing import Any, Final, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc

from kpu.format.codecs import Packing

# The low bytes of a chunk together, in one piece: zstd then codes them by their frequencies. Bits are for integers that
# are small in many channels: there whole runs of high bits are 0 (`docs/decisions.md`).
BLOSC_CNAME: Final = "zstd"
BLOSC_LEVEL: Final = 1
BLOSC_SHUFFLE: Final[dict[Packing, Literal["shuffle", "bitshuffle"]]] = {"bytes": "shuffle", "bits": "bitshuffle"}
BLOSC_BLOCK: Final = 2**18
_SHUFFLE: Final = {"bytes": blosc.SHUFFLE, "bits": blosc.BITSHUFFLE}

CRC_BYTES: Final = 4
_CRC_OF_INTACT: Final = 0x48674BC7  # crc32c of any bytes followed by their own crc32c

# Blosc believes its own header: a length beyond the chunk makes it read whatever lies behind it in memory.
BLOSC_HEADER: Final = struct.Struct("<BBBBIII")
"""Version, version of the codec, flags, bytes of a value, decoded bytes, bytes of a block, bytes in all."""
_VERSIONS: Final = (2, 1)
_MEMCPY: Final = 0b10
_KNOWN_FLAGS: Final = 0b1111_0111  # the other one is reserved
_ZSTD: Final = 0b100_00000
_CODEC: Final = 0b111_00000
_BLOCK_START: Final = 4  # bytes of one entry in the list of blocks behind the header


def use_one_thread() -> None:
    """Forbid blosc its own threads: with them its output is not deterministic, and every call takes a global lock."""
    blosc.use_threads = False


def encode_chunk(values: npt.NDArray[Any], packing: Packing) -> bytes:
    """The stored bytes of one C-contiguous chunk."""
    if packing == "plain":
        data: bytes = values.tobytes()
    else:
        if packing == "bits":
            values = np.ascontiguousarray(np.moveaxis(values, -1, 0))
        data = blosc.compress(values, BLOSC_CNAME.encode(), BLOSC_LEVEL, _SHUFFLE[packing], BLOSC_BLOCK)
    return data + crc(data)


def decode_chunk(raw: bytes, target: npt.NDArray[Any], packing: Packing) -> None:
    """Decode the stored bytes of one chunk, which must be intact, into the C-contiguous `target`.

    Raises:
        ValueError: the bytes are not those of a chunk of this size.
    """
    if packing == "plain":
        if len(raw) != target.nbytes + CRC_BYTES:
            raise ValueError(f"{len(raw) - CRC_BYTES} bytes where {target.nbytes} belong")
        target[...] = np.frombuffer(raw, target.dtype, count=target.size).reshape(target.shape)
        return
    check_blosc_header(raw, len(raw) - CRC_BYTES, target.nbytes, target.itemsize)
    try:
        if packing == "bits":
            channels_first = np.empty((target.shape[-1], *target.shape[:-1]), target.dtype)
            blosc.decompress(raw, channels_first)
            target[...] = np.moveaxis(channels_first, 0, -1)
        else:
            blosc.decompress(raw, target)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def check_blosc_header(head: bytes, stored: int, decoded: int, itemsize: int) -> None:
    """Compare the header of a chunk, which `head` begins with, with what it must say before blosc may see it.

    Args:
        head: the first bytes of the chunk.
        stored: how many bytes blosc made of it, its checksum left out.
        decoded: bytes of the decoded chunk.
        itemsize: bytes of one of its values.

    Raises:
        ValueError: decoding would read or write out of bounds, or give other than `decoded` bytes.
    """
    if stored < BLOSC_HEADER.size or len(head) < BLOSC_HEADER.size:
        raise ValueError(f"blosc header: expected {BLOSC_HEADER.size} bytes, found {min(stored, len(head))}")
    version, codec_version, flags, typesize, nbytes, block, cbytes = BLOSC_HEADER.unpack_from(head)
    if cbytes != stored or nbytes != decoded or typesize != itemsize:
        raise ValueError(
            f"blosc header: expected {stored} bytes for {decoded} of {itemsize} each, found {cbytes} for {nbytes} of "
            f"{typesize}"
        )
    if (version, codec_version) != _VERSIONS or flags & ~_KNOWN_FLAGS or flags & _CODEC != _ZSTD:
        raise ValueError(f"blosc header: expected zstd in version 2, found {version}.{codec_version}, flags {flags:#x}")
    if not 0 < block <= nbytes or block % typesize:
        raise ValueError(f"blosc header: expected blocks of up to {nbytes} bytes, found {block}")
    least = nbytes if flags & _MEMCPY else -(-nbytes // block) * _BLOCK_START
    extra = stored - BLOSC_HEADER.size - least
    if extra < 0 or (flags & _MEMCPY and extra):
        raise ValueError(f"blosc header: expected {BLOSC_HEADER.size + least} bytes for its blocks, found {stored}")


def crc(data: bytes) -> bytes:
    """The crc32c of `data` as Zarr appends it."""
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def is_intact(raw: bytes) -> bool:
    """Whether the last four bytes are the crc32c of those before."""
    return bool(google_crc32c.value(raw) == _CRC_OF_INTACT)
