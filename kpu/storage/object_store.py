"""A cache in an object store, through fsspec. Exclusive puts are the store's own (`If-None-Match: *` on S3)."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import fsspec

from kpu.errors import CorruptError, StorageError, StorageFault
from kpu.storage import paths
from kpu.storage.base import Data, check_key, check_removable, check_replaceable, check_size
from kpu.storage.places import redact
from kpu.util.failpoints import failpoint
from kpu.util.faults import error_code, is_conflict, is_fault

T = TypeVar("T")

# S3 takes 5 GiB in one put; fsspec splits from twice this size. Parts are not needed, nor exclusive on every server.
_SINGLE_PUT: Final = 5 * 2**29
_TAKEN: Final = frozenset({"PreconditionFailed", "412"})
_EMPTY: Final = frozenset({"InvalidRange", "416"})  # what an empty object answers to a request for a range
_CONFLICT_TRIES: Final = 8


class ObjectStorage:
    """An fsspec URL such as `s3://bucket/prefix`; credentials and endpoint come from the environment.

    Not to be carried over a fork: open it again in the child.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            # Listings are never cached: other processes publish while we look.
            self._fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            raise StorageError(f"{redact(url)}: {error}; for S3, install kpu[s3]") from None
        except Exception as error:
            raise StorageError(f"{redact(url)}: cannot be opened: {error}") from error
        self._root = str(root).rstrip("/")
        protocol = self._fs.protocol
        self._s3 = "s3" in ((protocol,) if isinstance(protocol, str) else protocol)

    def read(self, key: str, *, limit: int | None = None) -> bytes:
        most = paths.largest(key) if limit is None else limit
        try:
            data = self.read_range(key, 0, most + 1)
        except StorageError as error:
            if error_code(error.__cause__) in _EMPTY and self.size(key) == 0:
                return b""
            raise
        check_size(key, len(data), most)
        return data

    def open(self, key: str) -> "ObjectHandle":
        size = self.size(key)
        if size is None:
            raise FileNotFoundError(f"{self.url}/{key}: no such object in the cache")
        return ObjectHandle(self, key, size)

    def size(self, key: str) -> int | None:
        try:
            info: dict[str, Any] = self._call("read", key, self._fs.info)
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def names(self, folder: str) -> Iterator[str]:
        def listing(path: str) -> list[str]:
            found = [str(name).rstrip("/") for name in self._fs.ls(path, detail=False)]
            return [name.rpartition("/")[2] for name in found if name != path.rstrip("/")]  # a file lists itself

        try:
            yield from self._call("list", folder, listing)
        except FileNotFoundError:
            return

    def publish(self, key: str, data: Data, *, run: str) -> bool:
        check_key(run)
        won = self._call("write", key, lambda path: self._put_new(path, bytes(data)))
        if won:
            failpoint("publish.done")
        return won

    def replace(self, key: str, data: Data, *, run: str) -> None:
        check_key(run)
        check_replaceable(key)
        self._call("write", key, lambda path: _patiently(lambda: self._fs.pipe_file(path, bytes(data))))

    def quarantine(self, key: str, *, run: str) -> None:
        target = f"{self._root}/{paths.QUARANTINE}/{check_key(run)}/{check_key(key)}"

        def move(path: str) -> None:
            self._fs.cp_file(path, target)
            self._fs.rm_file(path)

        try:
            self._call("move to quarantine", key, move)
        except FileNotFoundError:
            return

    def remove(self, folder: str) -> int:
        check_removable(folder)

        def delete(path: str) -> int:
            found = self._fs.find(path, detail=True)
            if found:
                self._fs.rm(list(found))
            return sum(int(info["size"]) for info in found.values())

        try:
            return self._call("remove", folder, delete)
        except FileNotFoundError:
            return 0

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes from `start` to `end` of an object, fewer where it ends before."""
        return self._call("read", key, lambda path: bytes(self._fs.cat_file(path, start=start, end=end)))

    def _put_new(self, path: str, data: bytes) -> bool:
        one_put = {"chunksize": _SINGLE_PUT} if self._s3 else {}
        try:
            _patiently(lambda: self._fs.pipe_file(path, data, mode="create", **one_put))
        except FileExistsError:
            return False
        except Exception as error:
            if error_code(error) in _TAKEN:
                return False
            raise
        return True

    def _call(self, action: str, key: str, function: Callable[[str], T]) -> T:
        """Run `function` on the full path of `key`; whatever a store's client raises becomes a StorageError."""
        try:
            return function(f"{self._root}/{check_key(key)}")
        except StorageError:
            raise
        except Exception as error:
            if isinstance(error, FileNotFoundError) and action != "write":
                raise
            said = f"{redact(self.url)}: cannot {action} {key}: {str(error) or type(error).__name__}"
            if is_fault(error):
                raise StorageFault(f"{said}; start the same command again once the store answers") from error
            raise StorageError(said) from error


class ObjectHandle:
    """An object whose size was asked once; every read is a ranged request."""

    remote = True
    fetch_bytes = 8 << 20

    def __init__(self, storage: ObjectStorage, key: str, size: int) -> None:
        self._storage: ObjectStorage | None = storage
        self._key, self.size = key, size

    def read(self, offset: int, length: int) -> bytes:
        storage = self._storage
        if storage is None:
            raise StorageError(f"{self._key}: read after close")
        if not length:
            return b""
        if offset + length > self.size:
            raise CorruptError(self._key, f"ends before byte {offset + length}")
        try:
            data = storage.read_range(self._key, offset, offset + length)
        except FileNotFoundError:
            raise CorruptError(self._key, "was removed while it was read") from None
        if len(data) != length:
            raise CorruptError(self._key, f"ends before byte {offset + length}")
        return data

    def close(self) -> None:
        self._storage = None


def _patiently(put: Callable[[], object]) -> None:
    """Put an object; while another put of the name is under way, which the store answers with 409, try again."""
    for attempt in range(_CONFLICT_TRIES):
        try:
            put()
        except Exception as error:
            if not is_conflict(error) or attempt + 1 == _CONFLICT_TRIES:
                raise
            time.sleep(0.05 * 2**attempt)
        else:
            return
