"""Encoded bytes to RGB pixels, as a viewer shows them.

- Rotated as EXIF says. The first frame of an animation.
- Transparent pixels are laid over white: that is what a page shows. Dropping alpha (what `convert("RGB")` does) would
  bring out whatever colour lies hidden below it, often black or noise.
- 16 bits become 8 by the highest that are used, for grey as for colour: those that the file or the user names, else all
  16. An image whose highest four bits are never used is masked, for there it is not known. 32-bit, signed and floating
  point images have no agreed white, so they are stretched from their least to their greatest value (floats within
  0..1 are taken as they are).
- Colour profiles are ignored and CMYK is converted plainly, as in the pipelines that vision models are trained with.
- JPEG is decoded at full size, never in draft mode: every teacher must see the same pixels, whatever its input size.
- What Pillow would show wrongly or in part is recognised by its header, and mended or refused by name.
"""

import io
from types import TracebackType
from typing import Any, Final

from PIL import Image, UnidentifiedImageError

from kpu.format.commits import ImageStatus
from kpu.format.plan import Decoding
from kpu.pixels.formats import jpeg, jpeg2000, npy, png, tiff
from kpu.pixels.formats.names import why_unidentified
from kpu.pixels.pillow import load_jpeg2000, load_without_xmp, low_bytes, open_image, reset_pillow, unread_bytes
from kpu.pixels.refused import NoBytes, Refused
from kpu.pixels.rgb import Samples, to_rgb, upright
from kpu.pixels.room import Claim
from kpu.pixels.sizes import pixels_before_opening

_PLAIN: Final = Samples()
_JPEG: Final = ("JPEG", "MPO")


def decode_image(data: bytes, how: Decoding = Decoding()) -> Image.Image | ImageStatus:  # noqa: B008 - frozen
    """Decode one encoded image.

    Returns:
        An RGB image, upright; or why there is none. Deterministic in `data` and `how`; content never raises.

    Raises:
        MemoryError: this machine is out of memory, which says nothing about the image.
    """
    claim = Claim()
    try:
        return _decode_or_status(data, how, claim)
    finally:
        claim.give_back()


class Decoded:
    """A context that gives what `decode_image` does; while it is open, other threads leave the image its memory.

    The image is closed with it: a decoder that holds Python's lock would else begin before its memory is freed.
    Decoding begins once there is room for it, whatever that depends on: it never decides what comes out.
    """

    def __init__(self, data: bytes, how: Decoding) -> None:
        self._data, self._how, self._claim = data, how, Claim()

    def __enter__(self) -> Image.Image | ImageStatus:
        try:
            self._found = _decode_or_status(self._data, self._how, self._claim)
        except BaseException:
            self._claim.give_back()
            raise
        return self._found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self._found, Image.Image):
            self._found.close()
        self._claim.give_back()


def image_to_rgb(image: Image.Image, how: Decoding = Decoding()) -> Image.Image | ImageStatus:  # noqa: B008
    """What `decode_image` makes of the bytes of an image, from the image that Pillow opened, which stays as it is.

    Raises:
        OSError: it was not loaded yet, and its file is gone or broken.
    """
    data = unread_bytes(image)
    if data is not None:
        return decode_image(data, how.model_copy(update={"max_pixels": max(image.width * image.height, 1)}))
    load_without_xmp(image)
    try:
        return upright(to_rgb(image, _samples_of_loaded(image), how.bits, lambda: None), image)
    except Refused as refused:
        return refused.status


def _decode_or_status(data: bytes, how: Decoding, claim: Claim) -> Image.Image | ImageStatus:
    if not data:
        return data.status if isinstance(data, NoBytes) else ImageStatus.EMPTY
    try:
        return _decode(data, how, claim)
    except MemoryError:
        raise
    except Refused as refused:
        return refused.status
    except Image.DecompressionBombError:
        return ImageStatus.TOO_LARGE
    except UnidentifiedImageError:
        return why_unidentified(data)
    except Exception:  # decoders raise nearly anything at broken data: OSError, SyntaxError, struct.error, KeyError ...
        return ImageStatus.TRUNCATED


def _decode(data: bytes, how: Decoding, claim: Claim) -> Image.Image:
    if data.startswith(npy.MAGIC):
        array = npy.decode_npy(data, how.max_pixels)
        return to_rgb(array, Samples(), None, lambda: None)
    reset_pillow(how)
    tags = tiff.read_header(data, how.max_pixels) if data.startswith(tiff.SIGNATURES) else None
    _check_size(pixels_before_opening(data), how, claim)
    with open_image(data, tags) as image:
        _check_size(image.width * image.height, how, claim)
        if image.format in _JPEG:
            jpeg.check_scans(data, image.width * image.height, image)
        if image.format == "JPEG2000":
            mended = jpeg2000.decode_deep(data, load_jpeg2000)
            if mended is not None:
                return to_rgb(
                    mended, Samples(bits=16 if mended.mode.startswith("I") else 8, scaled=True), None, lambda: None
                )
        samples = _samples(image, data, tags)
        try:
            load_without_xmp(image)
        except (ValueError, SyntaxError) as error:
            if image.format != "PNG" or isinstance(error, UnidentifiedImageError):
                raise
            image = Image.open(io.BytesIO(png.without_comments(data)), formats=("PNG",))
            image.load()
        vars(image).pop("_decoder", None)  # of WebP and AVIF: it holds two more copies of the pixels
        rgb = to_rgb(image, samples, how.bits, lambda: low_bytes(data, tags))
        return upright(rgb, image)


def _check_size(pixels: int, how: Decoding, claim: Claim) -> None:
    if pixels > how.max_pixels:
        raise Refused(ImageStatus.TOO_LARGE)
    claim.take(pixels)


def _samples(image: Image.Image, data: bytes, tags: tiff.TiffHeader | None) -> Samples:
    if tags is not None:
        return Samples(tags.bits, tags.significant, tags.unsigned, tags.white_is_zero)
    if image.format == "PNG" and not png.is_plain(data):
        header = png.read_header(data)
        significant = header.significant
        if significant is None and header.bits == 16 and header.transparent is not None:
            significant = 16  # a sensor's data has no transparent colour: this was made to be shown, dark or not
        return Samples(header.bits, significant, transparent=header.transparent)
    if image.mode.startswith("I"):  # of a PGM or JPEG XL
        return Samples(bits=16, scaled=True)
    return _PLAIN


def _samples_of_loaded(image: Image.Image) -> Samples:
    """What an image that was loaded by somebody else still knows."""
    tags: Any = getattr(image, "tag_v2", None)
    if tags is not None:
        bits, formats_ = (tags.get(tag, default) for tag, default in ((258, 16), (339, (1,))))
        depth = int(bits[0] if isinstance(bits, tuple) else bits)
        return Samples(depth, unsigned=set(formats_) == {1}, white_is_zero=tags.get(262) == 0)
    transparency = image.info.get("transparency")
    if image.mode.startswith("I"):
        return Samples(16, transparent=(transparency,) if isinstance(transparency, int) else None)
    if image.mode == "RGB" and isinstance(transparency, tuple) and max(transparency) > 255:
        return Samples(16, transparent=transparency)
    return Samples()
