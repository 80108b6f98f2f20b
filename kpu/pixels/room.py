"""Room for large images: threads of one process decode side by side while memory lasts, and wait for each other then.

An image that is alone is always let in, so the memory at hand decides when an image is decoded, never whether.
"""

import ctypes
import os
import threading
from contextlib import suppress
from typing import Final

from kpu.util.memory import available_memory

BYTES_PER_PIXEL: Final = 16  # at the peak of decoding and resizing: animated formats hold three copies of four bytes
ALWAYS: Final = 512 * 2**20
"""Bytes that all images together may take without asking: 32 megapixels."""

SMALL: Final = 64 * 2**20
"""An image that takes no more bytes, of 4 megapixels, does not count: there are as many as threads."""

_SHARE: Final = 0.5  # of what is free; the rest is for teachers and other processes
_ASK_AGAIN_SECONDS: Final = 0.5  # other processes give memory back without a word


class _Room:
    def __init__(self) -> None:
        self.pid = os.getpid()
        self._changed = threading.Condition()
        self._taken = 0

    def take(self, size: int) -> None:
        """Wait until there is room for so many bytes beside what is taken."""
        with self._changed:
            while self._taken and self._taken + size > ALWAYS and self._taken + size > _free():
                self._changed.wait(_ASK_AGAIN_SECONDS)
            self._taken += size

    def give_back(self, size: int) -> None:
        with self._changed:
            self._taken -= size
            self._changed.notify_all()


def _free() -> int:
    return int(_SHARE * (available_memory() or 0))


def _trim() -> None:
    """Give freed memory back to the system: glibc keeps that of the last large image, in each thread."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


_room = _Room()


def _here() -> _Room:
    """The room of this process: a lock that was held while it was forked would never open."""
    global _room
    if _room.pid != os.getpid():
        _room = _Room()
    return _room


class Claim:
    """What one image takes, until `give_back`. A thread holds one at a time, so none waits for itself."""

    __slots__ = ("_room", "_size")

    def __init__(self) -> None:
        self._size = 0

    def take(self, pixels: int) -> None:
        """Wait for room for an image of so many pixels; instead of, not beside, what was claimed before."""
        size = pixels * BYTES_PER_PIXEL
        if size <= SMALL or size <= self._size:
            return
        self.give_back()
        self._room = _here()
        self._room.take(size)
        self._size = size

    def give_back(self) -> None:
        """Leave the room to others."""
        if self._size:
            if self._size > ALWAYS:
                _trim()
            self._room.give_back(self._size)
            self._size = 0
