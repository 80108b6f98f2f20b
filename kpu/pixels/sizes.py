"""Sizes that have to be read before Pillow opens a file, since opening it decodes more than a header."""

import struct
from typing import Final

JXL_BOXES: Final = b"\0\0\0\x0cJXL \r\n\x87\n"
_JXL: Final = b"\xff\x0a"
_ICO: Final = b"\0\0\1\0"
_PNG: Final = b"\x89PNG"
_RATIOS: Final = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def pixels_before_opening(data: bytes) -> int:
    """Pixels of a JPEG XL image, or of the largest in a Windows icon; 0 for other formats and what cannot be read."""
    try:
        if data.startswith(_ICO):
            return _largest_icon(data)
        if data.startswith((_JXL, JXL_BOXES)):
            return _jxl_pixels(data)
    except (struct.error, IndexError):
        return 0
    return 0


def _largest_icon(data: bytes) -> int:
    largest = 0
    for entry in range(struct.unpack_from("<H", data, 4)[0]):
        at = struct.unpack_from("<I", data, 6 + 16 * entry + 12)[0]
        png = data[at : at + 4] == _PNG
        width, height = struct.unpack_from(">II" if png else "<ii", data, at + (16 if png else 4))
        largest = max(largest, abs(width * height))
    return largest


def _jxl_pixels(data: bytes) -> int:
    """By the size header of ISO 18181-1."""
    at = data.find(_JXL, len(JXL_BOXES)) if data.startswith(JXL_BOXES) else 0
    bits = int.from_bytes(data[at + 2 : at + 18], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & (1 << count) - 1, bits >> count
        return value

    def side(small: bool) -> int:
        return 8 * (1 + take(5)) if small else 1 + take((9, 13, 18, 30)[take(2)])

    small = bool(take(1))
    height = side(small)
    ratio = take(3)
    if ratio:
        across, down = _RATIOS[ratio - 1]
        return height * (height * across // down)
    return height * side(small)
