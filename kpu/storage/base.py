"""Where a cache's bytes live: read anywhere, publish a name once and for all, move aside what is wrong.

`publish` is exclusive (one caller wins a name, every other gets False) and durable (once it returns, the object
survives a crash): `kpu.storage.local` does it with a synced temporary and `link()`, `kpu.storage.object_store` with
conditional puts. Keys are POSIX paths relative to the root, as in `kpu.storage.paths`.
"""

from collections.abc import Iterator
from typing import Protocol

from kpu.errors import CorruptError, StorageError
from kpu.storage import paths

Data = bytes | bytearray | memoryview


class Handle(Protocol):
    """Random access to one published object; safe to use from many threads."""

    size: int
    remote: bool  # a read costs a round trip over a network
    fetch_bytes: int  # up to here, one read that covers two pieces beats two reads

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`.

        Raises:
            CorruptError: the object ends before.
            StorageError: the object cannot be read.
        """

    def close(self) -> None:
        """Let go of the object. Reads that are under way end normally; later ones raise StorageError."""


class Storage(Protocol):
    """A cache's location. Every method raises StorageError where the location itself fails."""

    url: str

    def read(self, key: str, *, limit: int | None = None) -> bytes:
        """The whole object, of at most `limit` bytes; without it, of what its kind may have (`layout.largest`).

        Raises:
            FileNotFoundError: it is absent.
            CorruptError: it is larger.
        """

    def open(self, key: str) -> Handle:
        """Random access to the object. Raises FileNotFoundError if it is absent."""

    def size(self, key: str) -> int | None:
        """Bytes in the object, None if it is absent."""

    def names(self, folder: str) -> Iterator[str]:
        """Names directly in `folder`, files and folders, in any order; nothing if it is absent."""

    def publish(self, key: str, data: Data, *, run: str) -> bool:
        """Store `data` under `key` if that does not exist; False if it does. Durable when it returns.

        Raises:
            FullDiskError: no space is left; the name is not taken.
            StorageError: not writable, or the run's temporary folder is gone (it was declared dead).
        """

    def replace(self, key: str, data: Data, *, run: str) -> None:
        """Store `data` under `key`, replacing what is there; for `runs/` alone."""

    def quarantine(self, key: str, *, run: str) -> None:
        """Move an object aside to `.tmp/quarantine/<run>/<key>`; nothing happens if it is absent."""

    def remove(self, folder: str) -> int:
        """Delete a folder below `.tmp`; how many bytes that freed."""


def check_key(key: str) -> str:
    """Return `key` if it stays inside the cache.

    Raises:
        StorageError: it is empty, absolute, or has an empty, `.` or `..` part.
    """
    if any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key:
        raise StorageError(f"key {key!r}: expected a relative POSIX path without '', '.' and '..' parts")
    return key


def check_size(key: str, size: int, limit: int | None) -> None:
    """Raises CorruptError if an object is larger than `limit`, or, without it, than its kind may be."""
    most = paths.largest(key) if limit is None else limit
    if size > most:
        raise CorruptError(key, f"holds {size:,} bytes: expected at most {most:,}, so it is not read")


def check_replaceable(key: str) -> None:
    """Raises StorageError unless `key` is below `runs/`: every other name is written once."""
    if not key.startswith(f"{paths.RUNS}/"):
        raise StorageError(f"{key}: only objects below {paths.RUNS}/ may be replaced")


def check_removable(folder: str) -> None:
    """Raises StorageError unless `folder` is below `.tmp/`: nothing else is ever deleted."""
    if not check_key(folder).startswith(f"{paths.TEMPORARY}/"):
        raise StorageError(f"{folder}: only folders below {paths.TEMPORARY}/ may be removed")
