"""Views: which crop of an image stands in a row.

The plan stores five random numbers a row, not a box: the box needs the image's true size, which is known only once it
is decoded. The numbers are a pure function of (seed, key, view), so neither the order of the listing nor the number of
workers changes them.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa

DRAWS: Final = 5
SCALE: Final = (0.08, 1.0)
RATIO: Final = (3 / 4, 4 / 3)
TRIES: Final = 10

# Steps of the R2 low-discrepancy sequence: powers of the inverse plastic number (M. Roberts, 2018).
_STEP_AREA, _STEP_RATIO = 0.7548776662466927, 0.5698402909980532

Box = tuple[int, int, int, int]
"""Left, upper, right, lower in pixels; right and lower are just outside."""


class View(NamedTuple):
    """What to take of an image: a box (None: all of it), then perhaps mirrored left to right."""

    box: Box | None = None
    flip: bool = False


FULL: Final = View()


def draw_views(keys: Sequence[str], views: int, seed: int) -> pa.FixedSizeListArray:
    """Random numbers of `views` views of each key, all views of a key together.

    Returns:
        fixed_size_list<float64, 5> [len(keys) * views], each number uniform in [0, 1) with 53 random bits; null
        throughout where `views` is 1, which stands for the plain full view.
    """
    rows = len(keys) * views
    if views == 1:
        return pa.nulls(rows, pa.list_(pa.float64(), DRAWS))
    base = hashlib.blake2b(digest_size=8 * DRAWS, key=seed.to_bytes(16, "little", signed=True), person=b"kpu-views")
    numbers = [view.to_bytes(8, "little") for view in range(views)]
    digests = bytearray()
    for key in keys:
        name = key.encode()
        for number in numbers:
            state = base.copy()
            state.update(number + name)
            digests += state.digest()
    bits = np.frombuffer(bytes(digests), "<u8") >> np.uint64(11)
    return pa.FixedSizeListArray.from_arrays(pa.array(bits * 2.0**-53), DRAWS)


def resolve_view(
    draws: Sequence[float] | None,
    width: int,
    height: int,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
) -> View:
    """The view that `draws` stand for in an image of this size.

    The box is that of torchvision's RandomResizedCrop: area uniform in `scale` times the image's, the logarithm of its
    width / height uniform in that of `ratio`, place uniform. Where the box does not fit, area and ratio are tried
    again, ten times in all, then the largest central box within `ratio` is taken. torchvision draws new numbers for
    each try; here the two numbers are shifted along a low-discrepancy sequence, so that five are always enough.
    """
    if draws is None:
        return FULL
    area, shape, across, down, mirror = draws
    flip = mirror < 0.5
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(TRIES):
        target = width * height * (scale[0] + (scale[1] - scale[0]) * ((area + attempt * _STEP_AREA) % 1.0))
        aspect = math.exp(low + (high - low) * ((shape + attempt * _STEP_RATIO) % 1.0))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(across * (width - w + 1)), int(down * (height - h + 1))
            return View((left, upper, left + w, upper + h), flip)
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    left, upper = (width - w) // 2, (height - h) // 2
    return View((left, upper, left + w, upper + h), flip)
