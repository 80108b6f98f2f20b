"""JPEG 2000 of more than 8 bits, which Pillow rounds to 8 without noticing that white becomes 256, stored as 0.

So what is 0 may be black or white. A second decoding, of a copy whose markers say that all values are half as far from
the middle, cannot overflow and tells which. For the reversible transform the copy claims one more bit a sample, for the
irreversible one its quantisation steps are halved (ISO 15444-1, annexes A.5, A.6 and E.1).
"""

import struct
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from kpu.format.commits import ImageStatus
from kpu.pixels.refused import Refused

BOXES: Final = b"\0\0\0\x0cjP  \r\n\x87\n"
CODESTREAM: Final = b"\xff\x4f\xff\x51"

_COD, _COC, _QCD, _QCC, _SOT, _SOD = 0x52, 0x53, 0x5C, 0x5D, 0x90, 0x93
_CHANNELS: Final = 40  # where SIZ has their number, from the beginning of the codestream
_MAX_SEGMENTS: Final = 2**17
_REVERSIBLE: Final = 1
_PALETTE_OR_YCC: Final = (b"pclr", b"cmap")


class _Segment(NamedTuple):
    """A marker and the place of what follows its length."""

    kind: int
    start: int
    stop: int


def decode_deep(data: bytes, decode: Callable[[bytes], Image.Image]) -> Image.Image | None:
    """The image with white for white; None if Pillow reads it rightly: up to 8 bits, and grey of 10 to 16.

    `decode` is Pillow's part: the image in such bytes.

    Raises:
        Refused: its samples are of a kind that this does not mend.
    """
    begin = 0 if data.startswith(CODESTREAM) else data.find(CODESTREAM)
    if begin < 0:
        return None
    try:
        bits, signed = _samples(data, begin)
    except (struct.error, IndexError):
        return None
    if max(bits) <= 8 and not signed:
        return None
    image = decode(data)
    if image.mode.startswith("I") and not signed:
        return image
    head = data[:begin]
    special = image.mode in ("P", "PA", "CMYK") or any(box in head for box in _PALETTE_OR_YCC) or _is_ycc(head)
    if signed or special or len(set(bits)) > 1:
        raise Refused(ImageStatus.UNSUPPORTED_PIXELS)
    halved = decode(_halved(data, begin))
    values, which = np.asarray(image), np.asarray(halved)
    mended: npt.NDArray[np.uint8] = np.where((values == 0) & (which >= 128), np.uint8(255), values)
    return Image.fromarray(mended, image.mode)


def _is_ycc(head: bytes) -> bool:
    at = head.find(b"colr")
    return at >= 0 and head[at + 4 : at + 5] == b"\x01" and head[at + 7 : at + 11] == b"\0\0\0\x12"


def _samples(data: bytes, begin: int) -> tuple[list[int], bool]:
    """Bits of each channel, and whether any has a sign: SIZ comes first, and ends with three bytes for each."""
    channels: int = struct.unpack_from(">H", data, begin + _CHANNELS)[0]
    depths = [data[begin + _CHANNELS + 2 + 3 * channel] for channel in range(channels)]
    return [(depth & 0x7F) + 1 for depth in depths], any(depth & 0x80 for depth in depths)


def _halved(data: bytes, begin: int) -> bytes:
    """The same image with all values half as far from the middle of their range. Raises Refused."""
    copy = bytearray(data)
    segments = list(islice(_segments(data, begin), _MAX_SEGMENTS))
    if len(segments) == _MAX_SEGMENTS:
        raise Refused(ImageStatus.UNSUPPORTED_PIXELS)
    channels: int = struct.unpack_from(">H", data, begin + _CHANNELS)[0]
    many = channels > 256  # then a channel's number takes two bytes
    kinds = {_transform(data, segment, many) for segment in segments if segment.kind in (_COD, _COC)}
    if kinds == {_REVERSIBLE}:
        for channel in range(channels):
            copy[begin + _CHANNELS + 2 + 3 * channel] += 1
        return bytes(copy)
    if kinds != {0}:
        raise Refused(ImageStatus.UNSUPPORTED_PIXELS)
    for segment in segments:
        if segment.kind in (_QCD, _QCC):
            at = segment.start + (0 if segment.kind == _QCD else 1 + many)
            if copy[at] >> 5 == 0 or not copy[at] & 3:
                raise Refused(ImageStatus.UNSUPPORTED_PIXELS)
            copy[at] -= 1 << 5  # one guard bit less: as many bit planes as before
            for step in range(at + 1, segment.stop, 2):
                if copy[step] >> 3 == 31:
                    raise Refused(ImageStatus.UNSUPPORTED_PIXELS)
                copy[step] += 1 << 3  # the exponent: half the step
    return bytes(copy)


def _transform(data: bytes, segment: _Segment, many: bool) -> int:
    """The wavelet transform that a COD or COC segment names."""
    return data[segment.start + (9 if segment.kind == _COD else 6 + many)]


def _segments(data: bytes, begin: int) -> Iterator[_Segment]:
    """Segments of the main header and of those of all tile parts."""
    at, tile_end = begin + 2, 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        kind, length = data[at + 1], struct.unpack_from(">H", data, at + 2)[0]
        if kind == _SOD:
            if tile_end <= at:
                return
            at = tile_end
            continue
        if kind == _SOT:
            size = struct.unpack_from(">I", data, at + 6)[0]
            tile_end = at + size if size else len(data)
        yield _Segment(kind, at + 4, at + 2 + length)
        at += 2 + length
