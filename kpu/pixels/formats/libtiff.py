"""Silencing libtiff, for which Pillow has no switch."""

import ctypes
from pathlib import Path


def quiet_libtiff() -> None:
    """Stop libtiff from printing to stderr what is wrong with a broken file.

    Where the library cannot be found (it may be linked in, or there is no /proc) it stays as it is.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
        paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "/libtiff" in line}
        for path in paths:
            set_handler = ctypes.CDLL(path).TIFFSetErrorHandler
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)
    except (OSError, AttributeError, IndexError):
        return
