"""An image to the pixels that a teacher's own evaluation transform gives it, before normalisation.

For the full view this is timm's `create_transform(..., is_training=False)`: the image is scaled to cover
`floor(size / crop)`, or with crop_mode squash to be of that very size, then the centre is cut out. With crop_rounding
floor it is what the image processors of transformers do, which differ in where the centre lies. For a box it is
torchvision's `resized_crop`: the box is scaled to `size` whatever its shape. All are equal to those pixel for pixel;
crop_mode pad is what SAM's processor does to within half a grey level of what it adds.
"""

import math
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image

from kpu.format.teacher import InputSpec
from kpu.pixels.views import FULL, Box, View

MAX_SCALED_PIXELS: Final = 2**27
"""An image so elongated that it would be scaled to more pixels than this is scaled only where it is kept."""


class Geometry(NamedTuple):
    """The part of an InputSpec that decides pixels: teachers with equal geometry share them.

    `size` and `cover` are (H, W): the result's size, and what the image is scaled to cover before its centre is cut;
    with `squash` it is scaled to exactly that. With `floor` the place of the centre is rounded down, with `bgr` blue
    comes first. With `fill`, a colour, the image is scaled to fit into `size` and filled up with it.
    """

    size: tuple[int, int]
    cover: tuple[int, int]
    interpolation: str
    squash: bool = False
    floor: bool = False
    bgr: bool = False
    fill: tuple[int, int, int] | None = None


def geometry(spec: InputSpec) -> Geometry:
    """The geometry of a teacher's input."""
    height, width = spec.size
    cover = (math.floor(height / spec.crop), math.floor(width / spec.crop))
    return Geometry(
        size=spec.size,
        cover=cover,
        interpolation=spec.interpolation,
        squash=spec.crop_mode == "squash",
        floor=spec.crop_rounding == "floor",
        bgr=spec.channels == "bgr",
        fill=_fill(spec) if spec.crop_mode == "pad" else None,
    )


def _fill(spec: InputSpec) -> tuple[int, int, int]:
    """The mean as a colour; zeros after normalisation are at most half a grey level from it."""
    red, green, blue = (min(255, max(0, round(255 * value))) for value in spec.mean)
    return (red, green, blue) if spec.channels == "rgb" else (blue, green, red)


def resize_image(
    image: Image.Image, spec: InputSpec | Geometry, view: View = FULL, out: np.ndarray[Any, Any] | None = None
) -> np.ndarray[Any, Any]:
    """Bring one view of an RGB image to a teacher's input size.

    Args:
        image: RGB, upright.
        spec: the teacher's input, or its geometry (cheaper in a loop).
        view: which part, and whether mirrored.
        out: uint8 [H, W, 3] to write into, so that a batch needs no second copy.

    Returns:
        uint8 [H, W, 3] in the model's order of channels: `out`, or a new, read-only array.
    """
    shape = spec if isinstance(spec, Geometry) else geometry(spec)
    if view.box is None:
        image = _cover_and_cut(image, shape) if shape.fill is None else _fit_and_fill(image, shape, shape.fill)
    else:
        image = _resize(_cut(image, view.box), shape.size[1], shape.size[0], shape.interpolation)
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(image)
    if shape.bgr:
        pixels = pixels[..., ::-1]
    if out is None:
        return pixels
    out[...] = pixels
    return out


def _cover_and_cut(image: Image.Image, shape: Geometry) -> Image.Image:
    height, width = shape.size
    w, h = shape.cover[::-1] if shape.squash else scaled_size(shape.cover, image.width, image.height)
    if (w, h) == (width, height) == image.size:
        return image
    # Python rounds halves to even, as in torchvision's centre crop.
    rounded = math.floor if shape.floor else round
    left, upper = rounded((w - width) / 2), rounded((h - height) / 2)
    if w * h > MAX_SCALED_PIXELS:
        across, down = image.width / w, image.height / h
        box = (left * across, upper * down, (left + width) * across, (upper + height) * down)
        return image.resize((width, height), Image.Resampling[shape.interpolation.upper()], box=box)
    if shape.interpolation != "nearest" and not shape.squash:
        # Pillow scales first across, then down, with 8 bits between: columns that are not kept need not be scaled down.
        image = _resize(image, w, image.height, shape.interpolation)
        image = _cut(image, (left, 0, left + width, image.height))
        image = _resize(image, width, h, shape.interpolation)
        return _cut(image, (0, upper, width, upper + height))
    image = _resize(image, w, h, shape.interpolation)
    return _cut(image, (left, upper, left + width, upper + height))


def _fit_and_fill(image: Image.Image, shape: Geometry, colour: tuple[int, int, int]) -> Image.Image:
    height, width = shape.size
    scale = min(height / image.height, width / image.width)
    w, h = (max(1, int(side * scale + 0.5)) for side in image.size)
    canvas = Image.new("RGB", (width, height), colour)
    canvas.paste(_resize(image, w, h, shape.interpolation))
    return canvas


def scaled_size(cover: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """Width and height of an image scaled to cover `cover` (H, W), its shape kept; rounded as timm does."""
    if cover[0] == cover[1]:
        short, long = min(width, height), max(width, height)
        length = int(cover[0] * long / short)
        return (cover[0], length) if width <= height else (length, cover[0])
    ratio = min(height / cover[0], width / cover[1])
    return round(width / ratio), round(height / ratio)


def _resize(image: Image.Image, width: int, height: int, interpolation: str) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling[interpolation.upper()])


def _cut(image: Image.Image, box: Box) -> Image.Image:
    return image if box == (0, 0, *image.size) else image.crop(box)
