"""What a student takes for images, and what is said of anything else.

Letters: B images, H and W pixels.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from kpu.errors import MismatchError, SourceError
from kpu.format.commits import ImageStatus
from kpu.format.plan import Decoding
from kpu.format.reasons import reason, remedy
from kpu.pixels.decode import decode_image, image_to_rgb

OneImage = str | Path | bytes | Image.Image | npt.NDArray[Any] | Tensor
"""A file, the bytes of one, an image of Pillow, or uint8 [H, W, 3] in RGB. Any size."""
Images = OneImage | Iterable[OneImage]
"""One image or several; a uint8 [B, H, W, 3] array or tensor is several."""

_EXPECTED: Final = (
    "expected an image (a file, the bytes of one, a PIL image, or a uint8 array [H, W, 3] in RGB) or several in a list"
)


def load_images(images: Images, how: Decoding) -> list[Image.Image]:
    """Images in RGB, upright, as an extraction decodes them, which `how` says more of.

    Raises:
        MismatchError: something is no image, or cannot be decoded.
        SourceError: a file cannot be read.
    """
    if isinstance(images, str | Path | bytes | Image.Image):
        return [_load(images, "images", how)]
    if isinstance(images, np.ndarray | Tensor):
        return [_load(images, "images", how)] if images.ndim == 3 else _several(images, how)
    if isinstance(images, Iterable) and not isinstance(images, dict | set):
        return _several(images, how)
    raise MismatchError(f"images: {_EXPECTED}, found {_kind(images)}")


def _several(images: Iterable[OneImage], how: Decoding) -> list[Image.Image]:
    if isinstance(images, np.ndarray | Tensor) and images.ndim != 4:
        raise MismatchError(f"images: {_EXPECTED}, found {_kind(images)}")
    found = [_load(image, f"images[{number}]", how) for number, image in enumerate(images)]
    if not found:
        raise MismatchError(f"images: {_EXPECTED}, found none")
    return found


def _load(image: Any, where: str, how: Decoding) -> Image.Image:
    if isinstance(image, np.ndarray | Tensor):
        return _from_array(image, where)
    if isinstance(image, Image.Image):
        found, name = image_to_rgb(image, how), ""
    elif isinstance(image, bytes):
        found, name = decode_image(image, how), ""
    elif isinstance(image, str | Path):
        found, name = decode_image(_read(Path(image), where), how), f"{image}: "
    else:
        raise MismatchError(f"{where}: {_EXPECTED}, found {_kind(image)}")
    if isinstance(found, ImageStatus):
        advice = remedy(reason(found)) or "leave it out"
        raise MismatchError(
            f"{where}: {name}expected an image, found one that is {found.name} ({reason(found)}); {advice}"
        )
    return found


def _from_array(image: "npt.NDArray[Any] | Tensor", where: str) -> Image.Image:
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise MismatchError(
            f"{where}: expected uint8 [H, W, 3] in RGB, values from 0 to 255, found {_kind(image)}; the preprocessing "
            "is the student's own"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _read(file: Path, where: str) -> bytes:
    if file.is_dir():
        raise SourceError(
            f"{where}: {file}: expected an image file, found a folder; give its files: "
            f"sorted(Path({str(file)!r}).rglob('*.jpg'))"
        )
    try:
        return file.read_bytes()
    except OSError as error:
        raise SourceError(f"{where}: {file}: expected an image file ({error.strerror}); check the path") from None
    except ValueError as error:  # a name with a zero byte in it
        raise SourceError(f"{where}: {str(file)!r}: expected an image file ({error}); check the path") from None


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray | Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
