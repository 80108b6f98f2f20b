"""A small cache of values in memory, safe to use from several threads."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRUCache(Generic[K, V]):
    """The values used last, made on demand. Two threads may make the same value at once; neither waits.

    `size` is how many are kept; a function is asked whenever one is added.
    """

    def __init__(self, size: int | Callable[[], int]) -> None:
        self._size, self._values, self._lock = size, OrderedDict[K, V](), Lock()

    def get(self, key: K, make: Callable[[K], V]) -> V:
        """The value of `key`, or what `make(key)` returns, which is then kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make(key)
        with self._lock:
            self._values[key] = value
            size = self._size if isinstance(self._size, int) else self._size()
            while len(self._values) > size:
                self._values.popitem(last=False)
        return value
