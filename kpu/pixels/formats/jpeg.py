"""What the markers of a JPEG say before anything is decoded."""

import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from kpu.format.commits import ImageStatus
from kpu.pixels.refused import Refused

SIGNATURE: Final = b"\xff\xd8\xff"

MAX_SCANS: Final = 100
"""Encoders write about ten; each is a pass over all pixels, and a few bytes of file can ask for one."""

_FEW_SCANS: Final = 16  # of any image
_MAX_WORK: Final = 2**31  # pixels times scans, beyond the few

_SOS: Final = 0xDA
_EOI: Final = 0xD9
_ALONE: Final = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length
_FRAMES: Final = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
_DECODED: Final = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})  # baseline, extended and progressive
_SEQUENTIAL: Final = frozenset({0xC0, 0xC1, 0xC9})
_NEXT: Final = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]", re.DOTALL)  # the marker that ends a scan's data


class _Marker(NamedTuple):
    kind: int
    content: memoryview


def check_scans(data: bytes, pixels: int, image: Any) -> None:
    """Refuse a JPEG of so many pixels in more scans than any encoder writes. Raises Refused.

    `image` is what Pillow opened, whose file ends after the first scan's header: that tells most JPEGs from the others.
    """
    channels, end = getattr(image, "layers", 0), image.fp.tell()
    first = end - 8 - 2 * channels
    if "progressive" not in image.info and data[first : first + 2] == b"\xff\xda" and data[first + 4] == channels:
        return
    allowed = max(_FEW_SCANS, min(MAX_SCANS, _MAX_WORK // max(pixels, 1)))
    if not _in_several_scans(data):
        return
    scans = 0
    for marker in _markers(data):
        scans += marker.kind == _SOS
        if scans > allowed:
            raise Refused(ImageStatus.TOO_MANY_SCANS)


def _in_several_scans(data: bytes) -> bool:
    """Whether decoders go on after the first scan: in a progressive JPEG, or where it lacks a channel."""
    channels = 0
    for kind, content in _markers(data):
        if kind in _FRAMES and len(content) > 5:
            if kind not in _SEQUENTIAL:
                return True
            channels = content[5]
        elif kind == _SOS:
            return not content or content[0] < channels
    return False


def is_unsupported(data: bytes) -> bool:
    """Whether the header describes samples or a process that Pillow does not decode: 12 bits, lossless, JPEG-LS ..."""
    frame = next((marker for marker in _markers(data) if marker.kind in _FRAMES), None)
    if frame is None or len(frame.content) < 6:
        return False
    return frame.kind not in _DECODED or frame.content[0] != 8 or frame.content[5] not in (1, 3, 4)


def _markers(data: bytes) -> Iterator[_Marker]:
    """Markers with what belongs to them, up to the end of the image or the first that is broken."""
    view, at = memoryview(data), 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        kind = data[at + 1]
        if kind == 0xFF:  # padding
            at += 1
            continue
        if kind == _EOI:
            return
        if kind in _ALONE:
            at += 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield _Marker(kind, view[at + 4 : end])
        at = end
        if kind == _SOS:
            found = _NEXT.search(data, at)
            if found is None:
                return
            at = found.end() - 2
