"""A small cache of values in memory, safe to use from several threads."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The `size` values used last, made on demand. Two threads may make the same value at once; neither waits."""

    def __init__(self, size: int) -> None:
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
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        return value
