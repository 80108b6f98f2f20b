"""A storage that counts the bytes that are read from open objects."""

from threading import Lock
from typing import Any

from kpu.storage.base import Handle, Storage


class CountingStorage:
    """Another storage, whose handles count; `bytes` is what they have read so far. Safe to use from many threads."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self._lock = storage, Lock()
        self.url, self.bytes = storage.url, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def open(self, key: str) -> "_CountedHandle":
        return _CountedHandle(self._storage.open(key), self)

    def count(self, length: int) -> None:
        """Add bytes that were read."""
        with self._lock:
            self.bytes += length


class _CountedHandle:
    def __init__(self, handle: Handle, counted: CountingStorage) -> None:
        self._handle, self._counted = handle, counted
        self.size, self.remote, self.fetch_bytes = handle.size, handle.remote, handle.fetch_bytes

    def read(self, offset: int, length: int) -> bytes:
        self._counted.count(length)
        return self._handle.read(offset, length)

    def close(self) -> None:
        self._handle.close()
