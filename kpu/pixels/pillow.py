"""Pillow, without what it does on its own account: limits, warnings, and turning by XMP."""

import io
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from PIL import Image, ImageFile

from kpu.format.commits import ImageStatus
from kpu.format.plan import Decoding
from kpu.pixels.formats import png, tiff
from kpu.pixels.formats.names import formats
from kpu.pixels.refused import Refused

_QUIET: Final = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_XMP: Final = ("xmp", "XML:com.adobe.xmp")
_REREAD: Final = ("PNG", "TIFF", "JPEG2000")  # formats of which Pillow's image lacks what the bytes say
_FOREIGN: Final = "B" if sys.byteorder == "little" else "L"
_SWAPPED: Final = {
    **{f"{mode};16B": f"{mode};16L" for mode in ("RGB", "RGBA")},
    **{f"{mode};16L": f"{mode};16B" for mode in ("RGB", "RGBA")},
    **{f"{mode};16N": f"{mode};16{_FOREIGN}" for mode in ("RGB", "RGBA")},
}


def reset_pillow(how: Decoding) -> None:
    """Undo what other code in this process may have changed about Pillow.

    Its warnings are hidden, since the returned status says it instead; truncated images must fail, or the same
    bytes would be masked in one process and half grey in another; and its own limit must not be the lower one.
    """
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    if Image.MAX_IMAGE_PIXELS is not None and how.max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = how.max_pixels


def open_image(data: bytes, tags: tiff.TiffHeader | None = None) -> ImageFile.ImageFile:
    """The image, not loaded yet. Raises whatever Pillow does, and Refused."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats())
    except Image.DecompressionBombError:
        raise
    except Exception:
        if tags is not None:  # its directory is sound
            raise Refused(ImageStatus.UNSUPPORTED_PIXELS) from None
        if not data.startswith(png.SIGNATURE):
            raise
        # Pillow refuses a PNG for an oversized or broken colour profile or comment; a viewer does not.
        image = Image.open(io.BytesIO(png.without_comments(data)), formats=("PNG",))
    if tags is not None and tags.swapped:
        _rename_raw_mode(image, lambda mode: mode.replace("BS", "S").replace("BF", "F"))
    return image


def load_jpeg2000(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=("JPEG2000",))
    image.load()
    return image


def load_without_xmp(image: Image.Image) -> None:
    """Load an image; Pillow turns a TIFF as its XMP says, where that can be found."""
    if image.info.keys().isdisjoint(_XMP):
        image.load()
        return
    hidden: dict[Any, Any] = {name: image.info.pop(name) for name in _XMP if name in image.info}
    try:
        image.load()
    finally:
        image.info.update(hidden)


def unread_bytes(image: Image.Image) -> bytes | None:
    """The file of an image that Pillow opened and has not loaded, of a format of which it does not keep all."""
    if not isinstance(image, ImageFile.ImageFile) or image.format not in _REREAD or image.tell() or not image.tile:
        return None
    file = image.fp
    if file is None:
        return None
    place = file.tell()
    file.seek(0)
    try:
        return file.read()
    finally:
        file.seek(place)


def low_bytes(data: bytes, tags: tiff.TiffHeader | None) -> Image.Image | None:
    """16-bit colour again, by the lower byte of each sample; None if Pillow has no way to it."""
    if tags is not None and tags.apart:
        return None
    image = open_image(data, tags)
    if not all(_raw_mode(tile) in _SWAPPED for tile in image.tile):
        return None
    _rename_raw_mode(image, lambda mode: _SWAPPED[mode])
    with suppress(ValueError):
        load_without_xmp(image)
        return image
    return None


def _raw_mode(tile: Any) -> str:
    """The name of how a tile's samples lie in the file."""
    return str(tile[3] if isinstance(tile[3], str) else tile[3][0])


def _rename_raw_mode(image: ImageFile.ImageFile, rename: Callable[[str], str]) -> None:
    tiles: list[Any] = []
    for tile in image.tile:
        place: Any = tile
        mode = rename(_raw_mode(place))
        args = mode if isinstance(place[3], str) else (mode, *place[3][1:])
        tiles.append(type(place)(*place[:3], args))
    image.tile = tiles
