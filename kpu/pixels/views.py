"""Views: which crop of an image is in a row.

The plan stores five random numbers a row, not a box: the box needs the image's true size, which is known only once it
is decoded. The numbers are a pure function of (seed, key, view), so neither the order of the listing nor the number of
workers changes them.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from kpu.format.plan import CropSpec

DRAWS: Final = 5
TRIES: Final = 10
_DEFAULT: Final = CropSpec()

Box = tuple[int, int, int, int]
"""Left, upper, right, lower in pixels; right and lower are just outside."""


class View(NamedTuple):
    """What to take of an image: a box (None: all of it), then perhaps mirrored left to right."""

    box: Box | None = None
    flip: bool = False


FULL: Final = View()


def draw_views(keys: Sequence[str], views: int, seed: int) -> pa.ListArray:
    """Random numbers of `views` views of each key, all views of a key together.

    Returns:
        list<float64> [len(keys) * views] of five numbers each, uniform in [0, 1) with 53 random bits; null throughout
        where `views` is 1, which means the plain full view.
    """
    rows = len(keys) * views
    if views == 1:
        return pa.nulls(rows, pa.list_(pa.float64()))
    base = hashlib.blake2b(digest_size=8 * DRAWS, key=seed.to_bytes(16, "little", signed=True), person=b"kpu-views")
    numbers = [view.to_bytes(8, "little") for view in range(views)]
    digests = bytearray()
    for key in keys:
        name = key.encode()
        for number in numbers:
            state = base.copy()
            state.update(number + name)
            digests += state.digest()
    starts = np.arange(0, DRAWS * rows + 1, DRAWS, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(starts), pa.array(_uniform(bytes(digests))))


def _uniform(digests: bytes) -> np.ndarray[Any, Any]:
    """Random bytes as float64 in [0, 1), eight bytes each."""
    return (np.frombuffer(digests, "<u8") >> np.uint64(11)) * 2.0**-53


def _further(area: float, shape: float, attempt: int) -> tuple[float, float]:
    """Two numbers for one more try, a pure function of the two that did not fit."""
    state = hashlib.blake2b(struct.pack("<ddI", area, shape, attempt), digest_size=16, person=b"kpu-views")
    first, second = _uniform(state.digest()).tolist()
    return first, second


def resolve_view(draws: Sequence[float] | None, width: int, height: int, crop: CropSpec | None = None) -> View:
    """The view that `draws` give in an image of this size.

    The box is that of torchvision's RandomResizedCrop: area uniform in `scale` times the image's, the logarithm of its
    width / height uniform in that of `ratio`, place uniform. Where the box does not fit, area and ratio are tried
    again, ten times in all, then the largest central box within `ratio` is taken. torchvision draws new numbers for
    each try; here they are hashed from the first two, so that five are always enough. `crop` None means its
    defaults.
    """
    if draws is None:
        return FULL
    crop = crop or _DEFAULT
    scale, ratio = crop.scale, crop.ratio
    area, shape, across, down, mirror = draws
    flip = mirror < crop.flip
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(TRIES):
        first, second = (area, shape) if attempt == 0 else _further(area, shape, attempt)
        target = width * height * (scale[0] + (scale[1] - scale[0]) * first)
        aspect = math.exp(low + (high - low) * second)
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
