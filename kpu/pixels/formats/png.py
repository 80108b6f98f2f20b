"""What the chunks of a PNG say beyond what Pillow keeps: its depth, its significant bits, its transparent colour."""

import struct
from typing import Final, NamedTuple

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_KEPT: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"sBIT", b"IDAT", b"IEND", b"eXIf"})
_GREY, _RGB = 0, 2  # colour types


class PngHeader(NamedTuple):
    """`bits` of a sample as stored; `significant` are those that sBIT names; `transparent` one sample a channel."""

    bits: int
    significant: int | None
    transparent: tuple[int, ...] | None


def is_plain(data: bytes) -> bool:
    """Whether samples have the 8 bits of which Pillow keeps all that is said."""
    return data[24:25] == b"\x08"


def read_header(data: bytes) -> PngHeader:
    """The header of what begins with a PNG's signature; what is broken in it is left out.

    Raises:
        struct.error: it ends within the first chunk.
    """
    bits, colour = struct.unpack_from(">BB", data, 24)
    significant, transparent, at = None, None, len(SIGNATURE)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        content = data[at + 8 : at + 8 + min(length, 6)]
        if kind == b"IDAT":
            break
        if kind == b"sBIT" and content:
            significant = max(content[: 3 if colour & _RGB else 1])
        elif kind == b"tRNS" and colour in (_GREY, _RGB) and len(content) >= (6 if colour else 2):
            values = struct.unpack_from(">HHH" if colour else ">H", content)
            transparent = tuple(value & (1 << bits) - 1 for value in values)
        at += 12 + length
    return PngHeader(bits, significant, transparent)


def without_comments(png: bytes) -> bytes:
    """The PNG with only the chunks that decide its pixels."""
    parts, at = [SIGNATURE], len(SIGNATURE)
    while at + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        end = at + 12 + length
        if kind in _KEPT:
            parts.append(png[at:end])
        at = end
    return b"".join(parts)
