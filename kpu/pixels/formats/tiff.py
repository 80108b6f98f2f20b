"""What the tags of a TIFF say, so that an image that Pillow would show wrongly is refused by name.

Pillow leaves out extra bands and further pages, takes signed bytes for unsigned ones, and mistakes the order of bytes
of some images. What it reads rightly was found by comparison with tifffile.
"""

import struct
from typing import Final, NamedTuple

from kpu.format.commits import ImageStatus
from kpu.pixels.refused import Refused

SIGNATURES: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TYPES: Final = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 18: "Q"}  # whole numbers
_MAX_VALUES: Final = 4096
_MAX_TAGS: Final = 4096
_MAX_COPIES: Final = 64  # smaller copies and masks of the picture; pyramids have about ten

_KIND, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_SAMPLES, _HIGHEST, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _EXTRA, _FORMAT, _SUBSAMPLING = (
    277, 281, 284, 322, 323, 338, 339, 530,
)  # fmt: skip
_WANTED: Final = frozenset(
    {_KIND, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _HIGHEST, _PLANAR}
    | {_TILE_WIDTH, _TILE_HEIGHT, _EXTRA, _FORMAT, _SUBSAMPLING}
)
_OF_COPIES: Final = frozenset({_KIND, _WIDTH, _HEIGHT})
_REDUCED, _MASK = 1, 4  # in NewSubfileType
_COLOURS: Final = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # samples by photometric interpretation
_RGB, _YCBCR = 2, 6
_UINT, _INT = 1, 2  # sample formats
_RAW: Final = 1  # compression
_PREMULTIPLIED: Final = 1
_ALPHA: Final = (1, 2, 999)  # of ExtraSamples; 999 is Corel's

_Tags = dict[int, tuple[int, ...]]


class TiffHeader(NamedTuple):
    """`bits` of a sample as stored; `significant` those below MaxSampleValue, where it is 2**n - 1.

    `apart` says that the channels lie one after the other; `swapped` that Pillow takes decompressed values, which have
    this machine's order of bytes, for the file's.
    """

    bits: int
    significant: int | None
    unsigned: bool
    white_is_zero: bool
    apart: bool
    swapped: bool


def read_header(data: bytes, max_pixels: int) -> TiffHeader:
    """What the first page's tags say.

    Raises:
        Refused: they cannot be read, or Pillow would show another image, or a part of it.
    """
    try:
        order, tags, several = _pages(data)
    except (struct.error, KeyError, IndexError):
        raise Refused(ImageStatus.TRUNCATED) from None  # Pillow goes on with the tags that are left
    if several:
        raise Refused(ImageStatus.SEVERAL_PAGES)
    if tags.get(_KIND, (0,))[0] & _REDUCED or data[8:10] == b"CR":  # a preview comes first in what a camera writes
        raise Refused(ImageStatus.CAMERA_RAW)
    photometric, samples = _first(tags, _PHOTOMETRIC, 0), _first(tags, _SAMPLES, 1)
    bits, formats = set(tags.get(_BITS, (1,))), set(tags.get(_FORMAT, (_UINT,)))
    raw = _first(tags, _COMPRESSION, _RAW) == _RAW
    _check_bands(photometric, samples, tags.get(_EXTRA, ()))
    apart = samples > 1 and _first(tags, _PLANAR, 1) == 2
    _check_samples(bits, formats, raw and apart, tags.get(_EXTRA, ())[:1] == (_PREMULTIPLIED,))
    if photometric == _YCBCR and raw and tags.get(_SUBSAMPLING) != (1, 1):
        raise Refused(ImageStatus.UNSUPPORTED_PIXELS)
    if _first(tags, _TILE_WIDTH, 0) * _first(tags, _TILE_HEIGHT, 0) > max_pixels:
        raise Refused(ImageStatus.TOO_LARGE)
    highest = _first(tags, _HIGHEST, 0)
    significant = highest.bit_length() if highest & (highest + 1) == 0 and highest else None
    swapped = order == ">" and not raw and (max(bits) > 16 or _UINT not in formats)
    return TiffHeader(max(bits), significant, formats == {_UINT}, photometric == 0, apart, swapped)


def _check_bands(photometric: int, samples: int, extra: tuple[int, ...]) -> None:
    more = samples - _COLOURS.get(photometric, samples)
    if more <= 0:
        return
    unnamed_alpha = photometric == _RGB and not extra  # as libtiff takes it
    if more > 1 or not (unnamed_alpha or (extra and extra[0] in _ALPHA)):
        raise Refused(ImageStatus.SEVERAL_BANDS)


def _check_samples(bits: set[int], formats: set[int], raw_apart: bool, premultiplied: bool) -> None:
    """`raw_apart`: the channels lie one after the other, without compression."""
    mixed = len(bits) > 1 or len(formats) > 1
    signed_bytes = formats == {_INT} and max(bits) <= 8
    if mixed or signed_bytes or (raw_apart and (max(bits) > 8 or premultiplied)):
        raise Refused(ImageStatus.UNSUPPORTED_PIXELS)


def _pages(data: bytes) -> tuple[str, _Tags, bool]:
    """The order of bytes, the first page's tags, and whether another page is no smaller copy or mask of it."""
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    at: int = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
    first, following = _directory(data, at, order, big)
    seen = {0, at}
    while following not in seen:
        seen.add(following)
        if len(seen) > _MAX_COPIES:
            return order, first, True
        try:
            page, following = _directory(data, following, order, big, _OF_COPIES)
        except (struct.error, KeyError, IndexError):  # what comes after the picture may be broken
            break
        if not page.get(_KIND, (0,))[0] & (_REDUCED | _MASK):
            return order, first, True
    return order, first, False


def _directory(data: bytes, at: int, order: str, big: bool, wanted_tags: frozenset[int] = _WANTED) -> tuple[_Tags, int]:
    """Tags of whole numbers in the directory at an offset, and the offset of the next directory."""
    head, entry, word = ("Q", "HHQ", "Q") if big else ("H", "HHI", "I")
    count: int = struct.unpack_from(order + head, data, at)[0]
    if count > _MAX_TAGS:
        raise IndexError(count)
    at += struct.calcsize(order + head)
    room = struct.calcsize(order + word)
    width = struct.calcsize(order + entry) + room
    tags: _Tags = {}
    for place in range(at, at + count * width, width):
        tag, kind, length = struct.unpack_from(order + entry, data, place)
        code, inline = _TYPES.get(kind), place + width - room
        if tag not in wanted_tags or tag in tags or code is None or not 0 < length <= _MAX_VALUES:
            continue
        wanted = f"{order}{length}{code}"
        start = inline if struct.calcsize(wanted) <= room else struct.unpack_from(order + word, data, inline)[0]
        tags[tag] = struct.unpack_from(wanted, data, start)
    if not tags[_WIDTH] or not tags[_HEIGHT]:
        raise KeyError(_WIDTH)
    end = at + count * width
    following: int = struct.unpack_from(order + word, data, end)[0] if end + room <= len(data) else 0
    return tags, following


def _first(tags: _Tags, tag: int, default: int) -> int:
    return tags[tag][0] if tag in tags else default
