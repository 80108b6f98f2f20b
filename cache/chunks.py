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

Packing = Literal["plain", "bytes", "bits", "gzip"]

# The low bytes of a chunk together, in one piece: zstd then codes them by their frequencies. Bits are for integers that
# are small in many channels: there whole runs of high bits are 0 (`docs/decisions.md`).
BLOSC_CNAME: Final = "zstd"
BLOSC_LEVEL: Final = 1
BLOSC_SHUFFLE: Final[dict[Packing, Literal["shuffle", "bitshuffle"]]] = {"bytes": "shuffle", "bits": "bitshuffle"}
BLOSC_BLOCK: Final = 2**18
_SHUFFLE: Final = {"bytes": blosc.SHUFFLE, "bits": blosc.BITSHUFFLE}

CRC_BYTES: Final = 4
_CRC_OF_INTACT: Final = 0x48674BC7  # crc32c of any bytes followed by their own crc32c
_BLOSC_DECODED_BYTES: Final = struct.Struct("<I")  # at byte 4 of blosc's header


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
        target[...] = np.frombuffer(raw, target.dtype, count=target.size).reshape(target.shape)
        return
    try:
        (decoded_bytes,) = _BLOSC_DECODED_BYTES.unpack_from(raw, 4)
        if decoded_bytes != target.nbytes:
            raise ValueError(f"{decoded_bytes} decoded bytes where {target.nbytes} belong")
        if packing == "bits":
            channels_first = np.empty((target.shape[-1], *target.shape[:-1]), target.dtype)
            blosc.decompress(raw, channels_first)
            target[...] = np.moveaxis(channels_first, 0, -1)
        else:
            blosc.decompress(raw, target)
    except (RuntimeError, struct.error) as error:
        raise ValueError(str(error)) from None


def crc(data: bytes) -> bytes:
    """The crc32c of `data` as Zarr appends it."""
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def is_intact(raw: bytes) -> bool:
    """Whether the last four bytes are the crc32c of those before."""
    return bool(google_crc32c.value(raw) == _CRC_OF_INTACT)
