"""One inner chunk of a shard: little-endian bytes [-> blosc] -> crc32c, by libraries and in the calling thread."""

import struct
from typing import Any, Final

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc

# The low bytes of a chunk together, in one piece: zstd then codes them by their frequencies (`docs/decisions.md`).
BLOSC_CNAME: Final = "zstd"
BLOSC_LEVEL: Final = 1
BLOSC_SHUFFLE: Final = "shuffle"
BLOSC_BLOCK: Final = 2**18

CRC_BYTES: Final = 4
_CRC_OF_INTACT: Final = 0x48674BC7  # crc32c of any bytes followed by their own crc32c
_BLOSC_DECODED_BYTES: Final = struct.Struct("<I")  # at byte 4 of blosc's header


def use_one_thread() -> None:
    """Forbid blosc its own threads: with them its output is not deterministic, and every call takes a global lock."""
    blosc.use_threads = False


def encode_chunk(values: npt.NDArray[Any], *, compressed: bool) -> bytes:
    """The stored bytes of one C-contiguous chunk."""
    if compressed:
        data: bytes = blosc.compress(values, BLOSC_CNAME.encode(), BLOSC_LEVEL, blosc.SHUFFLE, BLOSC_BLOCK)
    else:
        data = values.tobytes()
    return data + crc(data)


def decode_chunk(raw: bytes, target: npt.NDArray[Any], *, compressed: bool) -> None:
    """Decode the stored bytes of one chunk, which must be intact, into the C-contiguous `target`.

    Raises:
        ValueError: the bytes are not those of a chunk of this size.
    """
    if not compressed:
        target[...] = np.frombuffer(raw, target.dtype, count=target.size).reshape(target.shape)
        return
    try:
        (decoded_bytes,) = _BLOSC_DECODED_BYTES.unpack_from(raw, 4)
        if decoded_bytes != target.nbytes:
            raise ValueError(f"{decoded_bytes} decoded bytes where {target.nbytes} belong")
        blosc.decompress(raw, target)
    except (RuntimeError, struct.error) as error:
        raise ValueError(str(error)) from None


def crc(data: bytes) -> bytes:
    """The crc32c of `data` as Zarr appends it."""
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def is_intact(raw: bytes) -> bool:
    """Whether the last four bytes are the crc32c of those before."""
    return bool(google_crc32c.value(raw) == _CRC_OF_INTACT)
