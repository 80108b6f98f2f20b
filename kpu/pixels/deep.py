"""Samples of 16 bits to 8. Letters: H and W height and width, C the channels."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kpu.format.commits import ImageStatus
from kpu.pixels.refused import Refused

_DARK_BITS: Final = 12
"""Where no sample uses the highest four bits, at most 16 grey levels would be left: 10 or 12 bits in a file of 16."""

Samples = npt.NDArray[np.uint16]


def eight_bits(samples: Samples, significant: int | None, bits: int | None) -> npt.NDArray[np.uint8]:
    """The highest 8 of the bits that an image uses, uint8, of uint16 of the same shape.

    `bits` is how many these are, if a user said so; `significant` how many the file names, which may still lie where
    PNG wants them, at the upper end.

    Raises:
        Refused: it is not known, or a sample has more.
    """
    highest = int(samples.max(initial=0))
    used = bits or _used_bits(samples, highest, significant)
    if highest >> used:
        raise Refused(ImageStatus.DEPTH_UNKNOWN)
    return (samples >> (used - 8)).astype(np.uint8)


def is_bright(high: npt.NDArray[np.uint8], significant: int | None, bits: int | None) -> bool:
    """Whether the high bytes alone say that all 16 bits are used, as in nearly every image."""
    if bits == 16 or (bits is None and significant == 16):
        return True
    return bits is None and int(high.max(initial=0)) >> (max(significant or _DARK_BITS, 8) - 8) > 0


def _used_bits(samples: Samples, highest: int, significant: int | None) -> int:
    if highest == 0:
        return 16
    if significant is not None:
        spare = (1 << 16 - significant) - 1  # empty if samples were moved to the upper end
        at_lower_end = 8 <= significant < 16 and not highest >> significant and bool(np.any(samples & spare))
        return significant if at_lower_end else 16
    if not highest >> _DARK_BITS:
        raise Refused(ImageStatus.DEPTH_UNKNOWN)
    return 16


def between_extremes(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Numbers without an agreed white as uint8 of the same shape: floats within 0..1 as they are, others stretched."""
    values = values.astype(np.float32, copy=False)
    finite = values[np.isfinite(values)]
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if least >= 0 and most <= 1:
        least, most = 0.0, 1.0
    scaled = (np.clip(values, least, most) - least) * (255 / max(most - least, 1e-30))
    grey: npt.NDArray[np.uint8] = np.nan_to_num(np.rint(scaled), nan=0.0).astype(np.uint8)
    return grey
