"""NumPy's .npy files as images: uint8 [H, W], [H, W, 3] or [H, W, 4] (grey, RGB, RGBA)."""

import re
from typing import Final, Literal

import numpy as np
from PIL import Image

from kpu.format.commits import ImageStatus
from kpu.pixels.refused import Refused

MAGIC: Final = b"\x93NUMPY"

# The header that NumPy writes, and no other: it is Python's syntax, which is not to be run to look at an image.
_HEADER: Final = re.compile(
    rb"\x93NUMPY(?:\x01\x00..|\x02\x00....)\{'descr': '([|<>=]\w{2,3})', 'fortran_order': (False|True), "
    rb"'shape': \((\d{1,9}), (\d{1,9})(?:, (\d{1,9}))?\), ?\} *\n",
    re.DOTALL,
)
_NUMBERS: Final = frozenset(b"iufb")


def decode_npy(data: bytes, max_pixels: int) -> Image.Image:
    """An image of mode L, RGB or RGBA.

    Raises:
        Refused: it is cut short, too large, or an array of another kind.
    """
    header = _HEADER.match(data)
    if header is None:
        whole = b"\n" in data[12:]  # the header ends with it
        raise Refused(ImageStatus.NOT_AN_IMAGE if whole else ImageStatus.TRUNCATED)
    height, width, channels = (int(number or 0) for number in header.groups()[2:])
    if not height * width or header[5] == b"0" or header[1][1] not in _NUMBERS:
        raise Refused(ImageStatus.NOT_AN_IMAGE)
    if channels not in (0, 3, 4):
        raise Refused(ImageStatus.SEVERAL_BANDS)
    if header[1] != b"|u1":
        raise Refused(ImageStatus.UNSUPPORTED_PIXELS)
    if height * width > max_pixels:
        raise Refused(ImageStatus.TOO_LARGE)
    size = height * width * max(channels, 1)
    if len(data) - header.end() < size:
        raise Refused(ImageStatus.TRUNCATED)
    shape = (height, width, channels) if channels else (height, width)
    order: Literal["C", "F"] = "F" if header[2] == b"True" else "C"
    values = np.frombuffer(data, np.uint8, size, header.end()).reshape(shape, order=order)
    return Image.fromarray(np.ascontiguousarray(values))
