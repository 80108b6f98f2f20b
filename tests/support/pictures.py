"""Encoded images for tests, some of kinds that Pillow does not write."""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from kpu.format.plan import Decoding
from kpu.pixels.decode import decode_image

Values = npt.NDArray[Any]


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: Values, extra: bytes = b"", bits: int = 16) -> bytes:
    """A PNG of [H, W, channels] with 16 bits, which Pillow cannot write in colour, or of grey with fewer than 8."""
    height, width, channels = values.shape
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in values]
    else:
        places = np.unpackbits(values.astype(np.uint8)[..., 0, None], axis=-1)[..., 8 - bits :]
        rows = [np.packbits(row.ravel()).tobytes() for row in places]
    header = struct.pack(">IIBBBBB", width, height, bits, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(
    values: Values | Sequence[Values],
    photometric: int = 1,
    *,
    order: str = "<",
    packed: bool = False,
    apart: bool = False,
    tags: dict[int, tuple[int, ...]] | None = None,
    kinds: Sequence[int] = (),
) -> bytes:
    """A TIFF of one page [H, W] or [H, W, channels], or of several; `kinds` are the pages' NewSubfileType.

    `packed` with Deflate; `apart` one channel after the other.
    """
    pages = [values] if isinstance(values, np.ndarray) else list(values)
    data = bytearray(struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 0))
    link = 4
    for number, page in enumerate(pages):
        samples = 1 if page.ndim == 2 else page.shape[2]
        plane = np.moveaxis(page, -1, 0) if apart else page
        strips = [part.astype(page.dtype.newbyteorder(order)).tobytes() for part in (plane if apart else [plane])]
        places = []
        for strip in strips:
            content = zlib.compress(strip) if packed else strip
            places.append((len(data), len(content)))
            data += content
        bits = 8 * page.dtype.itemsize
        described: dict[int, tuple[int, ...]] = {
            254: (kinds[number] if kinds else 0,),
            256: (page.shape[1],),
            257: (page.shape[0],),
            258: (bits,) * samples,
            259: (8 if packed else 1,),
            262: (photometric,),
            273: tuple(at for at, _ in places),
            277: (samples,),
            278: (page.shape[0],),
            279: tuple(length for _, length in places),
            284: (2 if apart else 1,),
            339: ({"u": 1, "i": 2, "f": 3}[page.dtype.kind],) * samples,
            **(tags or {}),
        }
        link = _directory(data, described, order, link)
    return bytes(data)


def _directory(data: bytearray, tags: dict[int, tuple[int, ...]], order: str, link: int) -> int:
    """Append a directory, enter it at `link`; where the next one is to be entered."""
    entries = b""
    for tag, numbers in sorted(tags.items()):
        place = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            at = len(data)
            data += place
            place = struct.pack(order + "I", at)
        entries += struct.pack(order + "HHI", tag, 4, len(numbers)) + place
    data += b"\0" * (len(data) % 2)
    struct.pack_into(order + "I", data, link, len(data))
    data += struct.pack(order + "H", len(tags)) + entries
    data += bytes(4)
    return len(data) - 4


def pixels(data: bytes, how: Decoding = Decoding()) -> npt.NDArray[np.uint8]:  # noqa: B008 - frozen
    image = decode_image(data, how)
    assert isinstance(image, Image.Image), image
    assert image.mode == "RGB"
    return np.asarray(image)
