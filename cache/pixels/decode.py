"""Encoded bytes to RGB pixels, as a viewer shows them.

- Rotated as EXIF says. The first frame of an animation.
- Transparent pixels are laid over white: that is what a page shows. Dropping alpha (what `convert("RGB")` does) would
  bring out whatever colour lies hidden below it, often black or noise.
- 16 bits become 8 by their high byte, for grey as for colour; floating point and 32-bit images have no agreed white, so
  they are stretched from their least to their greatest value (floats within 0..1 are taken as they are).
- Colour profiles are ignored and CMYK is converted plainly, as in the pipelines that vision models are trained with.
- JPEG is decoded at full size, never in draft mode: every teacher must see the same pixels, whatever its input size.
- NumPy's .npy files are images where they hold uint8 [H, W], [H, W, 3] or [H, W, 4] (grey, RGB, RGBA).
"""

import ctypes
import io
import logging
import re
import struct
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from cache.spec import ImageStatus

MAX_PIXELS: Final = 178_956_970
"""Larger images are taken for decompression bombs (Pillow's own limit: a quarter of a GiB of RGB, twice over)."""

# Raster formats with a signature. Others are left out on purpose: PostScript runs an interpreter, TGA accepts anything.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
_SIGNATURE: Final = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"
    rb"|....ftypavi[fs]",
    re.DOTALL,
)
_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"})

_NPY_MAGIC: Final = b"\x93NUMPY"
# The header that NumPy writes, and no other: it is Python's syntax, which is not to be run to look at an image.
_NPY: Final = re.compile(
    rb"\x93NUMPY(?:\x01\x00..|\x02\x00....)\{'descr': '\|u1', 'fortran_order': (False|True), "
    rb"'shape': \((\d{1,9}), (\d{1,9})(?:, ([34]))?\), ?\} *\n",
    re.DOTALL,
)

_QUIET: Final = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_ORIENTATION: Final = 0x0112
_ORIENTED: Final = frozenset({"exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"})
_TURNS: Final[dict[Any, Image.Transpose]] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags


def decode_image(data: bytes) -> Image.Image | ImageStatus:
    """Decode one encoded image.

    Returns:
        An RGB image, upright; or why there is none. Deterministic in `data`; content never raises.

    Raises:
        MemoryError: this machine is out of memory, which says nothing about the image.
    """
    if not data:
        return ImageStatus.EMPTY
    if data.startswith(_NPY_MAGIC):
        return _decode_npy(data)
    _settle()
    try:
        with _open(data) as image:
            if image.width * image.height > MAX_PIXELS:
                return ImageStatus.TOO_LARGE
            return shown_rgb(image)
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        return ImageStatus.TOO_LARGE
    except UnidentifiedImageError:
        return ImageStatus.TRUNCATED if _SIGNATURE.match(data) else ImageStatus.NOT_AN_IMAGE
    except Exception:  # decoders raise nearly anything at broken data: OSError, SyntaxError, struct.error, KeyError ...
        return ImageStatus.TRUNCATED


def shown_rgb(image: Image.Image) -> Image.Image:
    """What `decode_image` makes of the bytes of an image, from the image that Pillow opened, which stays as it is.

    Raises:
        OSError: it was not loaded yet, and its file is gone or broken.
    """
    image.load()
    return _upright(_to_rgb(image), image)


def _decode_npy(data: bytes) -> Image.Image | ImageStatus:
    """An RGB image from the bytes of an .npy file."""
    header = _NPY.match(data)
    if header is None:
        whole = b"\n" in data[12:]  # the header ends with it
        return ImageStatus.NOT_AN_IMAGE if whole else ImageStatus.TRUNCATED
    height, width, channels = (int(number or 0) for number in header.groups()[1:])
    size = height * width * max(channels, 1)
    if not size:
        return ImageStatus.NOT_AN_IMAGE
    if height * width > MAX_PIXELS:
        return ImageStatus.TOO_LARGE
    if len(data) - header.end() < size:
        return ImageStatus.TRUNCATED
    shape = (height, width, channels) if channels else (height, width)
    order: Literal["C", "F"] = "F" if header[1] == b"True" else "C"
    values = np.frombuffer(data, np.uint8, size, header.end()).reshape(shape, order=order)
    return _to_rgb(Image.fromarray(np.ascontiguousarray(values)))


def _settle() -> None:
    """Undo what other code in this process may have changed about Pillow.

    Its warnings are hidden, since the returned status says it instead; and truncated images must fail, or the same
    bytes would be masked in one process and half grey in another.
    """
    if _QUIET not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    _quiet_libtiff()
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Python prints its errors where nobody asked
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _quiet_libtiff() -> None:
    """Stop libtiff from printing to stderr what is wrong with a broken file: Pillow has no switch for that.

    Where the library cannot be found (it may be linked in, or there is no /proc) it stays as it is.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
        paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "/libtiff" in line}
        for path in paths:
            set_handler = ctypes.CDLL(path).TIFFSetErrorHandler
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)
    except (OSError, AttributeError, IndexError):
        return


def _open(data: bytes) -> ImageFile.ImageFile:
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError:
        raise
    except Exception:
        if not data.startswith(_PNG_SIGNATURE):
            raise
        # Pillow refuses a PNG for an oversized or broken colour profile or comment; a viewer does not.
        return Image.open(io.BytesIO(_without_comments(data)), formats=("PNG",))


def _without_comments(png: bytes) -> bytes:
    """The PNG with only the chunks that decide its pixels."""
    parts, at = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while at + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        end = at + 12 + length
        if kind in _PNG_KEPT:
            parts.append(png[at:end])
        at = end
    return b"".join(parts)


def _to_rgb(image: Image.Image) -> Image.Image:
    mode, transparency = image.mode, image.info.get("transparency")
    if mode == "RGB" and transparency is None:
        return image
    if mode.startswith("I") or mode == "F":
        return Image.fromarray(_stretch(image)).convert("RGB")
    if mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        return image if converted is None else converted
    if transparency is not None or mode[-1] in "Aa":
        return _over_white(image)
    return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    transparency = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparency, tuple) and max(transparency) > 255:
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparency)  # of a PNG with 16 bits
    rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _stretch(image: Image.Image) -> np.ndarray[Any, Any]:
    """Grey of more than 8 bits as uint8 [H, W]."""
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF
    found = tags.get(_BITS_PER_SAMPLE, 16)
    bits = int(found[0] if isinstance(found, tuple) else found)
    values = np.asarray(image)
    if bits > 16 or image.mode == "F":
        grey = _between_extremes(values.astype(np.float32, copy=False))
    else:
        grey = np.right_shift(np.clip(values, 0, 2**bits - 1), max(bits - 8, 0)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    transparency = image.info.get("transparency")
    if isinstance(transparency, int):
        grey = np.where(values == transparency, np.uint8(255), grey)
    return grey


def _between_extremes(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    finite = values[np.isfinite(values)]
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if least >= 0 and most <= 1:
        least, most = 0.0, 1.0
    scaled = (np.clip(values, least, most) - least) * (255 / max(most - least, 1e-30))
    grey: np.ndarray[Any, Any] = np.nan_to_num(np.rint(scaled), nan=0.0).astype(np.uint8)
    return grey


def _upright(rgb: Image.Image, source: Image.Image) -> Image.Image:
    """Turn as the source's EXIF says; broken EXIF is ignored, as viewers do. Pillow turns TIFFs on its own."""
    if _ORIENTED.isdisjoint(source.info):
        return rgb
    try:
        turn = _TURNS.get(source.getexif().get(_ORIENTATION))
    except MemoryError:
        raise
    except Exception:
        return rgb
    return rgb if turn is None else rgb.transpose(turn)
