"""Which formats are decoded, and the names of those that are not."""

import logging
import re
from functools import cache
from importlib import import_module
from typing import Final

from PIL import Image

from kpu.format.commits import ImageStatus
from kpu.pixels.formats import jpeg
from kpu.pixels.formats.libtiff import quiet_libtiff

# Raster formats with a signature. Others are left out on purpose: PostScript runs an interpreter, TGA accepts anything.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "HEIF", "JXL")

_OURS: Final = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II[*+]\0|MM\0[*+]|\0\0\0\x0cjP  \r\n\x87\n"
    rb"|\xff\x4f\xff\x51|....ftypavi[fs]",
    re.DOTALL,
)
_JXL: Final = re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", re.DOTALL)
_HEIC: Final = re.compile(rb"....ftyp(?:he[iv][cmsx]|m[is]f1)", re.DOTALL)
_SVG: Final = re.compile(rb"<svg[\s>]")
_OTHERS: Final = (
    (rb"%!PS|\xc5\xd0\xd3\xc6", ImageStatus.EPS),
    (rb"%PDF-", ImageStatus.PDF),
    (rb"8BPS", ImageStatus.PSD),
    (rb".{128}DICM", ImageStatus.DICOM),
    # OpenEXR, DirectDraw, Apple icons, JPEG XR, Radiance, FITS, Fuji and Canon raw
    (rb"\x76\x2f\x31\x01|DDS |icns|II\xbc\x01|#\?RADIANCE|SIMPLE  =", ImageStatus.OTHER_FORMAT),
    (rb"FUJIFILMCCD-RAW|....ftypcrx |IIRO|IIU\0", ImageStatus.CAMERA_RAW),
)
_PATTERNS: Final = tuple((re.compile(pattern, re.DOTALL), status) for pattern, status in _OTHERS)


@cache
def formats() -> tuple[str, ...]:
    """The formats that this Pillow decodes, with those of its plug-ins that are installed."""
    Image.init()
    for plugin, register in (("pillow_heif", "register_heif_opener"), ("pillow_jxl", None)):
        try:
            module = import_module(plugin)
        except ImportError:
            continue
        if register is not None:
            getattr(module, register)(thumbnails=False)
    quiet_libtiff()
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Python prints its errors where nobody asked
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def why_unidentified(data: bytes) -> ImageStatus:
    """Why Pillow recognises no image in bytes that are not empty."""
    if _JXL.match(data):
        return ImageStatus.TRUNCATED if "JXL" in formats() else ImageStatus.JXL_WITHOUT_PLUGIN
    if _HEIC.match(data):
        return ImageStatus.TRUNCATED if "HEIF" in formats() else ImageStatus.HEIC_WITHOUT_PLUGIN
    if data.startswith(jpeg.SIGNATURE) and jpeg.is_unsupported(data):
        return ImageStatus.UNSUPPORTED_PIXELS
    if _OURS.match(data):
        return ImageStatus.TRUNCATED
    if data[:3].strip(b"\xef\xbb\xbf \r\n").startswith(b"<") and _SVG.search(data, 0, 2048):
        return ImageStatus.SVG
    return next((status for pattern, status in _PATTERNS if pattern.match(data)), ImageStatus.NOT_AN_IMAGE)
