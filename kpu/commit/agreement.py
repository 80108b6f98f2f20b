"""Whether two encodings of the same features agree: another worker's shard may then stay instead of ours."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kpu.records.teachers import PublishedTeacher
from kpu.records.units import Mask

# Two lossless encodings agree within this many channel standard deviations, or within one step of the number format.
LOSSLESS_TOLERANCE: Final = 1e-2
FORMAT_STEP: Final = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}


def agree(
    teacher: PublishedTeacher, output: str, theirs: npt.NDArray[Any], ours: npt.NDArray[Any], valid: Mask
) -> bool:
    """Whether stored rows [n, ...] of an output have the same masks, and agree within one step where `valid` [n].

    Lossless codecs have no step: see `LOSSLESS_TOLERANCE`.
    """
    grid, fill, std = teacher.grids[output], teacher.layouts[output].fill, teacher.statistics[output].std
    for row in range(len(ours)):  # one at a time: the differences of a whole shard would fill the memory
        if not valid[row]:
            if not np.array_equal(theirs[row], ours[row], equal_nan=ours.dtype.kind == "f"):
                return False
        elif grid.on_grid:
            steps, own_steps = (grid.steps(each[row]).astype(np.int32) for each in (theirs, ours))
            if (theirs[row] == fill).any() or np.abs(steps - own_steps).max() > 1:
                return False
        else:
            there, here = grid.decode(theirs[row]), grid.decode(ours[row])
            tolerance = np.maximum(LOSSLESS_TOLERANCE * std, FORMAT_STEP[grid.codec.name] * np.abs(here))
            if not (np.abs(there - here) <= tolerance).all():
                return False
    return True
