"""Memory of a training on a CPU: what one step frees, the next one takes."""

import ctypes
import sys
from typing import Final

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_LARGEST: Final = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, in this process from now on; without effect where there is no glibc.

    Else every tensor above some megabytes is mapped again in each step, page by page: a tenth of a step of a side
    student on maps, and more than half of standardising a batch.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, _LARGEST)
