"""Fixed images, and what an image processor of transformers makes of them.

Letters: H and W the height and width of what it makes.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.teachers.backbone import reason

Values = npt.NDArray[np.float32]

Levels = npt.NDArray[np.float32]
"""[H, W, 3] of red, green and blue: 0 if the image would be black, 255 where white."""

SIZES: Final = ((312, 211), (196, 331), (473, 330), (81, 391), (53, 42), (137, 109))
"""Width and height of the fixed images, chosen so that with the usual crops the two ways of rounding differ."""

_LARGEST = 2  # of them
WHITE: Final = 255
_FLAT = 64  # pixels, the side of an image of one colour


class NoPixels(Exception):
    """A processor gives no [3, H, W]; the message goes on after its name."""


class NoSize(Exception):
    """A processor makes images of several sizes; the message goes on after its name."""


@lru_cache(maxsize=1)
def pictures() -> tuple[Image.Image, ...]:
    """The fixed images: waves, edges, fine lines and flat parts, different in each channel."""
    found = []
    for width, height in SIZES:
        y, x = np.mgrid[:height, :width].astype(np.float64)
        red = 127.5 + 100 * np.sin(x / 17 + y / 41) * np.cos(y / 23)
        green = np.where((x // 19 + y // 13) % 3 == 1, 230, 40 + x * 120 / width)
        disc = np.hypot(x - width / 2, y - height / 2) < min(width, height) / 3
        blue = np.where(disc, 250, 15 + y % 4 * 9)
        pixels = np.stack([red, green, blue], -1)
        pixels[(x + 2 * y) % 53 < 2] = 0
        found.append(Image.fromarray(pixels.astype(np.uint8)))
    return tuple(found)


class Trials:
    """The fixed images and what a processor makes of each, made when it is first asked for.

    Between them is one that is larger than what the processor makes, so that it is scaled down.
    """

    def __init__(self, processor: Any, own: Mapping[str, Any]) -> None:
        self._processor, self._own = processor, own
        self._pictures = list(pictures())
        self._made = [self._make(picture) for picture in self._pictures[:2]]
        self.size = self._size(0)
        self._pictures.insert(2, _larger(self.size))
        self._check_size(1)

    @property
    def first(self) -> list[Levels]:
        """Of a landscape and a portrait."""
        return self._made[:2]

    def __iter__(self) -> Iterator[tuple[Image.Image, Levels]]:
        for i, picture in enumerate(self._pictures):
            if i == len(self._made):
                self._made.append(self._make(picture))
                self._check_size(i)
            yield picture, self._made[i]

    def _make(self, picture: Image.Image) -> Levels:
        return _levels(_run(self._processor, picture), self._own)

    def _size(self, i: int) -> tuple[int, int]:
        return self._made[i].shape[0], self._made[i].shape[1]

    def _check_size(self, i: int) -> None:
        if self._size(i) != self.size:
            said = [
                f"{height} x {width} pixels of an image of {picture.height} x {picture.width}"
                for picture, (height, width) in ((self._pictures[at], self._size(at)) for at in (0, i))
            ]
            raise NoSize(f"makes {said[0]}, and {said[1]}; expected one size")


def _larger(size: tuple[int, int]) -> Image.Image:
    """The largest of the fixed images, repeated until it is larger than `size` (H, W), in other proportions."""
    pixels = np.asarray(pictures()[_LARGEST])
    height, width = size[0] * 5 // 4 | 1, size[1] * 3 // 2 | 1
    times = (-(-height // pixels.shape[0]), -(-width // pixels.shape[1]), 1)
    return Image.fromarray(np.tile(pixels, times)[:height, :width])


def _run(processor: Any, image: Image.Image, *, tiles: bool = False) -> Values:
    """What the model would be given for one image, [3, H, W]; with `tiles` the first of several."""
    try:
        with np.errstate(all="ignore"):
            batch = processor(images=image, return_tensors="pt")
        found = batch.get("pixel_values") if isinstance(batch, Mapping) else None
        values = np.asarray(found[0] if isinstance(found, list | tuple) else found, np.float32)
    except Exception as error:  # of code that is not ours
        raise NoPixels(f"fails on an image of {image.height} x {image.width}: {reason(error)}") from error
    if found is None:
        given = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise NoPixels(f"gives {given or 'nothing'}, expected pixel_values")
    shape = list(values.shape)
    while values.ndim > 3 and (len(values) == 1 or (tiles and len(values))):
        values = values[0]
    if values.ndim != 3 or len(values) != 3 or not values.size:
        other = "" if len(shape) > 3 else "; a model that takes no such images cannot be an hf: teacher"
        raise NoPixels(f"gives pixel_values {shape}, expected one image [3, H, W]{other}")
    return values


def run_on_colour(processor: Any, colour: tuple[int, int, int]) -> Values:
    """What an image of one colour becomes, [3]."""
    values = _run(processor, Image.new("RGB", (_FLAT, _FLAT), colour), tiles=True)
    return values[:, values.shape[1] // 2, values.shape[2] // 2].copy()


def _levels(values: Values, own: Mapping[str, Any]) -> Levels:
    """Normalised values [3, H, W] back as the grey levels of red, green and blue."""
    std, mean = (np.array(own[key], np.float32) for key in ("std", "mean"))
    levels = (values.transpose(1, 2, 0) * std + mean) * WHITE
    return levels[..., ::-1] if own.get("channels") == "bgr" else levels
