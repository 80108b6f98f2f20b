"""From the image that Pillow opened to RGB: grey, palettes, inks, transparency, more than 8 bits, and the way up."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from kpu.format.commits import ImageStatus
from kpu.pixels.deep import between_extremes, eight_bits, is_bright
from kpu.pixels.refused import Refused

_ORIENTATION: Final = 0x0112
_RAW_EXIF: Final = "Raw profile type exif"  # of a PNG by ImageMagick
_TURNS: Final[dict[Any, Image.Transpose]] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Samples:
    """What a file says of its samples, where Pillow does not keep it.

    `bits` of a sample as stored, `significant` those that are used, `transparent` the samples of the one transparent
    colour; `scaled` where Pillow has brought grey of more than 8 bits to 16.
    """

    bits: int = 8
    significant: int | None = None
    unsigned: bool = True
    white_is_zero: bool = False
    transparent: tuple[int, ...] | None = None
    scaled: bool = False


def to_rgb(
    image: Image.Image, samples: Samples, bits: int | None, low_bytes: Callable[[], Image.Image | None]
) -> Image.Image:
    """A loaded image as RGB; its own object where it is that already.

    `bits` is how many of 16 are used, where a user said so; `low_bytes` decodes again the lower half of 16-bit colour,
    None if that cannot be done.

    Raises:
        Refused: its depth is not known.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey(image, samples, bits)).convert("RGB")
    if samples.bits == 16 and image.mode in ("RGB", "RGBA"):
        image = _colour(image, samples, bits, low_bytes)
    mode, transparency = image.mode, image.info.get("transparency")
    if mode == "RGB" and transparency is None:
        return image
    if mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        return image if converted is None else converted
    if transparency is not None or mode[-1] in "Aa":
        return _over_white(image, samples)
    return image.convert("RGB")


def _over_white(image: Image.Image, samples: Samples) -> Image.Image:
    if samples.transparent is not None and samples.bits < 8 and image.mode == "L":
        image = image.copy()  # Pillow compares what it scaled to 8 bits with what the file says
        image.info["transparency"] = samples.transparent[0] * 255 // (2**samples.bits - 1)
    transparency = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparency, tuple) and max(transparency) > 255:
        image = image.copy()
        image.info["transparency"] = tuple(value & 255 for value in transparency)  # only these count, PNG says
    rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _grey(image: Image.Image, samples: Samples, bits: int | None) -> npt.NDArray[np.uint8]:
    """Grey of more than 8 bits as uint8 [H, W]."""
    values: npt.NDArray[Any] = np.asarray(image)
    if samples.bits > 16 or image.mode == "F" or not samples.unsigned:
        if values.dtype == np.int32 and samples.unsigned:
            values = values.view(np.uint32)  # Pillow has no such mode
        grey = between_extremes(values)
    else:
        depth = max(samples.bits, 8) if samples.bits < 16 else 16 if samples.scaled else bits
        grey = eight_bits(np.clip(values, 0, 2**16 - 1).astype(np.uint16), samples.significant, depth)
    if samples.white_is_zero:
        grey = 255 - grey
    if samples.transparent is not None:
        grey = np.where(values == samples.transparent[0], np.uint8(255), grey)
    return grey


def _colour(
    image: Image.Image, samples: Samples, bits: int | None, low_bytes: Callable[[], Image.Image | None]
) -> Image.Image:
    """RGB or RGBA of which `image` holds the high bytes, as the 8 bits that count, without `transparency`."""
    high = np.asarray(image)
    if samples.transparent is None and is_bright(high[..., :3], samples.significant, bits):
        return image
    low = low_bytes()
    if low is None:
        known = bits is not None or samples.significant is not None
        raise Refused(ImageStatus.UNSUPPORTED_PIXELS if known else ImageStatus.DEPTH_UNKNOWN)
    values = high.astype(np.uint16) << 8 | np.asarray(low)
    colours = eight_bits(values[..., :3], samples.significant, bits)
    if samples.transparent is not None:
        colours[(values[..., :3] == samples.transparent).all(axis=-1)] = 255
    return Image.fromarray(np.concatenate([colours, high[..., 3:]], axis=-1))


def upright(rgb: Image.Image, source: Image.Image) -> Image.Image:
    """Turn as the source's EXIF says; broken EXIF is ignored, as viewers do. Pillow turns TIFFs on its own.

    What XMP says of it is ignored, as in browsers: programs that turn the pixels leave it behind.
    """
    exif = source.info.get("exif")
    if source.format == "JXL" and not getattr(source, "jpeg", False):
        return rgb  # its own header says how it is turned, and the plug-in has done it; but not for a packed JPEG
    try:
        if exif is None and _RAW_EXIF in source.info:
            exif = bytes.fromhex("".join(source.info[_RAW_EXIF].split("\n")[3:]))
        if not isinstance(exif, bytes) or hasattr(source, "tag_v2"):
            return rgb
        tags = Image.Exif()
        tags.load(exif)
        turn = _TURNS.get(tags.get(_ORIENTATION))
    except MemoryError:
        raise
    except Exception:
        return rgb
    return rgb if turn is None else rgb.transpose(turn)
