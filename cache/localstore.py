"""A cache in a folder of a POSIX file system."""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from cache import layout
from cache.errors import CorruptError, FullDiskError, NotACacheError, StorageError
from cache.failpoints import failpoint
from cache.storage import Data, check_key, check_removable, check_replaceable

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_KNOWN_FOLDERS: Final = 4096


class LocalStorage:
    """A folder of a POSIX file system with hard links."""

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False) -> None:
        self.root = Path(os.path.abspath(path))  # noqa: PTH100  (resolve() would follow the user's own links)
        self.url = str(self.root)
        self._durable: set[Path] = set()  # folders whose names are synced from the root down
        if create:
            self._create_root()
        if not self.root.is_dir():
            found = "a file" if self.root.exists() else "nothing"
            raise NotACacheError(f"{self.root}: expected the folder of a cache, found {found}; check the path")

    def read(self, key: str) -> bytes:
        try:  # pathlib would cost a third of what `status` takes with many commit records
            with open(f"{self.url}/{check_key(key)}", "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise self._error(error, key, "read") from error

    def open(self, key: str) -> "LocalHandle":
        try:
            return LocalHandle(self._path(key), key)
        except OSError as error:
            raise self._error(error, key, "read") from error

    def size(self, key: str) -> int | None:
        try:
            found = self._path(key).stat()
            return found.st_size if stat.S_ISREG(found.st_mode) else None
        except OSError as error:
            translated = self._error(error, key, "read")
            if isinstance(translated, FileNotFoundError):
                return None
            raise translated from error

    def names(self, folder: str) -> Iterator[str]:
        try:
            with os.scandir(self._path(folder)) as entries:
                for entry in entries:
                    yield entry.name
        except OSError as error:
            translated = self._error(error, folder, "list")
            if not isinstance(translated, FileNotFoundError):
                raise translated from error

    def publish(self, key: str, data: Data, *, run: str) -> bool:
        final, temporary = self._path(key), self._temporary(run)
        try:
            try:
                self._write(temporary, data, run)
                failpoint("publish.synced")
                final.parent.mkdir(parents=True, exist_ok=True)
                won = _link(temporary, final)
                failpoint("publish.linked")
                # Also where the name was taken: whoever took it may have died before this sync.
                self._sync_folders(final.parent)
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
        except OSError as error:
            raise self._error(error, key, "write") from error
        if won:
            failpoint("publish.done")
        return won

    def replace(self, key: str, data: Data, *, run: str) -> None:
        check_replaceable(key)
        final, temporary = self._path(key), self._temporary(run)
        try:
            try:
                self._write(temporary, data, run)
                final.parent.mkdir(parents=True, exist_ok=True)
                temporary.replace(final)
                self._sync_folders(final.parent)
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
        except OSError as error:
            raise self._error(error, key, "write") from error

    def quarantine(self, key: str, *, run: str) -> None:
        origin = self._path(key)
        target = self._path(f"{layout.QUARANTINE}/{check_key(run)}/{key}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
            origin.rename(target)
            self._sync_folders(target.parent)
            self._sync_folders(origin.parent)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._error(error, key, "move to quarantine") from error

    def remove(self, folder: str) -> int:
        check_removable(folder)
        freed = 0
        for parent, _, files in os.walk(self._path(folder)):
            for name in files:
                with suppress(FileNotFoundError):
                    freed += os.lstat(Path(parent, name)).st_size
        try:
            shutil.rmtree(self._path(folder))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._error(error, folder, "remove") from error
        return freed

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _temporary(self, run: str) -> Path:
        return self._path(f"{layout.TEMPORARY}/{check_key(run)}/{secrets.token_hex(12)}")

    def _create_root(self) -> None:
        try:
            missing = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
            self.root.mkdir(parents=True, exist_ok=True)
            for folder in missing:
                sync_folder(folder.parent)
        except OSError as error:
            raise self._error(error, str(self.root), "create") from error

    def _write(self, temporary: Path, data: Data, run: str) -> None:
        """Write and sync the temporary of `run`, whose folder must stand: a run declared dead must not publish."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(temporary, flags, 0o666)
        except FileNotFoundError:
            raise StorageError(
                f"{self.root}: the temporary folder {layout.TEMPORARY}/{run} does not exist: the run holds no lease, "
                "or was declared dead and collected; start the command again"
            ) from None
        try:
            view = memoryview(data).cast("B")
            _write_all(descriptor, view[: len(view) // 2])
            failpoint("publish.temporary")
            _write_all(descriptor, view[len(view) // 2 :])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _sync_folders(self, folder: Path) -> None:
        """Sync `folder`, and every folder above it, up to the root, that this process has not synced yet."""
        sync_folder(folder)
        if len(self._durable) > _KNOWN_FOLDERS:
            self._durable.clear()
        while folder != self.root and folder not in self._durable:
            sync_folder(folder.parent)
            self._durable.add(folder)
            folder = folder.parent

    def _error(self, error: OSError, key: str, action: str) -> Exception:
        """The error to raise for what the operating system said."""
        if isinstance(error, FileNotFoundError | NotADirectoryError) and action in ("read", "list"):
            return FileNotFoundError(errno.ENOENT, "no such object in the cache", f"{self.root}/{key}")
        reason = error.strerror or type(error).__name__
        if error.errno in FULL:
            return FullDiskError(f"{self.root}: cannot {action} {key}: {reason}; free some space and start again")
        advice = ""
        if error.errno == errno.ENOENT:
            advice = "; this run's temporary files or the cache itself were removed; start the command again"
        if error.errno == errno.EMFILE:
            advice = "; allow this process more of them with `ulimit -n`"
        if error.errno in _NO_LINKS:
            advice = "; expected a writable file system with hard links; use another one"
        return StorageError(f"{self.root}: cannot {action} {key}: {reason}{advice}")


class LocalHandle:
    """An open file. The descriptor lives until the last read that uses it has ended."""

    remote = False
    fetch_bytes = 128 << 10

    def __init__(self, path: Path, key: str) -> None:
        self._key = key
        self._descriptor: _Descriptor | None = _Descriptor(path)
        self.size = os.fstat(self._descriptor.number).st_size

    def read(self, offset: int, length: int) -> bytes:
        descriptor = self._descriptor
        if descriptor is None:
            raise StorageError(f"{self._key}: read after close")
        try:
            data = os.pread(descriptor.number, length, offset)
            while len(data) < length:  # a signal, or more than the kernel gives at once
                more = os.pread(descriptor.number, length - len(data), offset + len(data))
                if not more:
                    raise CorruptError(self._key, f"ends before byte {offset + length}")
                data += more
        except OSError as error:
            raise StorageError(f"{self._key}: cannot read: {error.strerror}") from error
        return data

    def close(self) -> None:
        self._descriptor = None


class _Descriptor:
    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


def _link(origin: Path, target: Path) -> bool:
    try:
        os.link(origin, target)
    except FileExistsError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(error: OSError, path: Path) -> StorageError:
    """The error to raise where the operating system refuses to write `path`."""
    if error.errno in FULL:
        return FullDiskError(f"cannot write {path}: {error.strerror}; free some space and start again")
    return StorageError(f"cannot write {path}: {error.strerror}")
