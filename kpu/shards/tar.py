"""One row as a member of a tar that the `webdataset` library reads by itself: `<row>.<teacher>.<output>.npy[.gz]`.

NumPy's own format, inside gzip where the codec gives something to compress. The bytes depend on the values alone.
"""

import io
import math
import tarfile
import zlib
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

TAR_BLOCK: Final = tarfile.BLOCKSIZE
TAR_END: Final = bytes(2 * tarfile.BLOCKSIZE)
TAR_CRC_SHIFT: Final = 32
"""In the index of a tar, sizes have the crc32c of the payload in their upper half."""

_GZIP: Final = 16 + zlib.MAX_WBITS
# Higher levels cost three to six times the time for a twentieth of the size.
_LEVEL: Final = 1


def member_name(row: int, member: str, *, compressed: bool) -> str:
    """The name of a row's file; to `webdataset` the row, in twelve digits, is the key, and the rest the extension."""
    return f"{row:012d}.{member}.npy{'.gz' if compressed else ''}"


def tar_header(name: str, size: int) -> bytes:
    """The block before a member's bytes: a plain file without time or owner."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o444
    return info.tobuf(tarfile.PAX_FORMAT)


def encode_member(values: npt.NDArray[Any], *, compressed: bool) -> bytes:
    """The bytes of one row."""
    data = _header(values.shape, values.dtype) + np.ascontiguousarray(values).tobytes()
    if not compressed:
        return data
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
    return packer.compress(data) + packer.flush()


def decode_member(raw: bytes, target: npt.NDArray[Any], *, compressed: bool) -> None:
    """Decode one row into the C-contiguous `target`.

    Raises:
        ValueError: the bytes are not those of a row of this shape and dtype.
    """
    header = _header(target.shape, target.dtype)
    if compressed:
        unpacker = zlib.decompressobj(_GZIP)
        try:
            raw = unpacker.decompress(raw, len(header) + target.nbytes + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        if not unpacker.eof:
            raise ValueError("the compressed row is longer or shorter than it should be")
    if len(raw) != len(header) + target.nbytes or raw[: len(header)] != header:
        raise ValueError(f"{len(raw)} bytes where an npy file of {target.dtype}{list(target.shape)} belongs")
    target[...] = np.frombuffer(raw, target.dtype, offset=len(header)).reshape(target.shape)


def is_fill(values: npt.NDArray[Any], fill: float) -> bool:
    """Whether a row holds nothing but the fill: it is masked, and left out of the tar."""
    return bool(np.isnan(values).all() if math.isnan(fill) else (values == fill).all())


@cache
def _header(shape: tuple[int, ...], dtype: "np.dtype[Any]") -> bytes:
    file = io.BytesIO()
    description = {
        "descr": np.lib.format.dtype_to_descr(dtype.newbyteorder("<")),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue()
