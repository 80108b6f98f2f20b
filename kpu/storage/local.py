"""A cache in a folder of a POSIX file system. No symbolic link below it is followed (see `kpu.storage.beneath`)."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from kpu.errors import FullDiskError, LinkError, NotACacheError, StorageError, StorageFault
from kpu.storage import paths
from kpu.storage.base import Data, check_key, check_removable, check_replaceable, check_size
from kpu.storage.beneath import make_folder, open_file, open_folder, read_all, remove_tree, status_of
from kpu.storage.created import Created
from kpu.storage.local_handle import LocalHandle
from kpu.util.failpoints import failpoint
from kpu.util.faults import FAULTS

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EACCES, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_KNOWN_FOLDERS: Final = 4096
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class LocalStorage:
    """A folder of a POSIX file system with hard links. What it makes there is noted in `created`, if that is given."""

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False, created: Created | None = None) -> None:
        self.root = Path(os.path.abspath(path))  # noqa: PTH100  (messages show the user's own links unresolved)
        self.url = str(self.root)
        self.created = created
        self._durable: set[str] = set()  # folders whose names are synced from the root down
        if create:
            self._create_root()
        if not self.root.is_dir():
            found = "a file" if self.root.exists() else "nothing"
            raise NotACacheError(f"{self.root}: expected the folder of a cache, found {found}; check the path")
        self._real = os.path.realpath(self.root)  # the user may name a cache by a link, which is followed here alone

    def read(self, key: str, *, limit: int | None = None) -> bytes:
        try:
            descriptor, size = open_file(self._real, check_key(key))
        except OSError as error:
            raise self._error(error, key, "read") from error
        try:
            check_size(key, size, limit)
            return read_all(descriptor, size)
        except OSError as error:
            raise self._error(error, key, "read") from error
        finally:
            os.close(descriptor)

    def open(self, key: str) -> LocalHandle:
        try:
            return LocalHandle(*open_file(self._real, check_key(key)), key)
        except OSError as error:
            raise self._error(error, key, "read") from error

    def size(self, key: str) -> int | None:
        try:
            found = status_of(self._real, check_key(key))
            return found.st_size if stat.S_ISREG(found.st_mode) else None
        except OSError as error:
            translated = self._error(error, key, "read")
            if isinstance(translated, FileNotFoundError):
                return None
            raise translated from error

    def names(self, folder: str) -> Iterator[str]:
        try:
            with self.folder(check_key(folder)) as descriptor, os.scandir(descriptor) as entries:
                for entry in entries:
                    yield entry.name
        except OSError as error:
            translated = self._error(error, folder, "list")
            if not isinstance(translated, FileNotFoundError):
                raise translated from error

    def publish(self, key: str, data: Data, *, run: str) -> bool:
        folder, _, name = check_key(key).rpartition("/")
        try:
            with self._written(data, run) as (temporary, beside):
                failpoint("publish.synced")
                with self.folder(folder, make=True) as final:
                    won = self._link(beside, temporary, name, final, key)
                    failpoint("publish.linked")
                    # Also where the name was taken: whoever took it may have died before this sync.
                    self._sync_folders(folder, final)
        except OSError as error:
            raise self._error(error, key, "write") from error
        if won:
            failpoint("publish.done")
        return won

    def replace(self, key: str, data: Data, *, run: str) -> None:
        check_replaceable(key)
        folder, _, name = check_key(key).rpartition("/")
        try:
            with self._written(data, run) as (temporary, beside), self.folder(folder, make=True) as final:
                if self.created is not None and not _exists(name, final):
                    self.created.file(key)
                os.replace(beside, name, src_dir_fd=temporary, dst_dir_fd=final)
                self._sync_folders(folder, final)
        except OSError as error:
            raise self._error(error, key, "write") from error

    def quarantine(self, key: str, *, run: str) -> None:
        target = f"{paths.QUARANTINE}/{check_key(run)}/{check_key(key)}"
        (origin, _, name), (aside, _, _) = key.rpartition("/"), target.rpartition("/")
        try:
            with self.folder(origin) as source, self.folder(aside, make=True) as destination:
                if _exists(name, destination):
                    target = f"{target}.{secrets.token_hex(4)}"
                kept = target.rpartition("/")[2]
                os.rename(name, kept, src_dir_fd=source, dst_dir_fd=destination)
                self._sync_folders(aside, destination)
                self._sync_folders(origin, source)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._error(error, key, "move to quarantine") from error
        if self.created is not None:
            self.created.moved(key, target)

    def remove(self, folder: str) -> int:
        check_removable(folder)
        above, _, name = folder.rpartition("/")
        try:
            status_of(self._real, folder)  # names a link in the way
            with self.folder(above) as descriptor:
                return remove_tree(name, descriptor)
        except (FileNotFoundError, NotADirectoryError):
            return 0
        except OSError as error:
            raise self._error(error, folder, "remove") from error

    @contextmanager
    def folder(self, key: str, *, make: bool = False) -> Iterator[int]:
        """A descriptor of a folder below the root, for as long as the context lasts; with `make`, it is made."""
        if key:
            check_key(key)
        noted = None if self.created is None else self.created.folder
        descriptor = make_folder(self._real, key, noted) if make and key else open_folder(self._real, key)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _create_root(self) -> None:
        missing = [folder for folder in (self.root, *self.root.parents) if not os.path.lexists(folder)]
        try:
            for folder in reversed(missing):
                with suppress(FileExistsError):
                    folder.mkdir()
                    if self.created is not None:
                        self.created.above.append(folder)
            self.root.mkdir(exist_ok=True)
            for folder in missing:
                sync_folder(folder.parent)
        except OSError as error:
            raise self._error(error, str(self.root), "create") from error

    @contextmanager
    def _written(self, data: Data, run: str) -> Iterator[tuple[int, str]]:
        """A temporary of `run`, written and synced: a descriptor of its folder, and its name there. Gone at the end.

        The folder must exist: a run declared dead must not publish.
        """
        try:
            temporary, beside = open_folder(self._real, f"{paths.TEMPORARY}/{check_key(run)}"), secrets.token_hex(12)
        except FileNotFoundError:
            raise self._declared_dead(run) from None
        try:
            try:
                descriptor = os.open(beside, _NEW_FILE, 0o666, dir_fd=temporary)
            except FileNotFoundError:
                raise self._declared_dead(run) from None
            try:
                _write_synced(descriptor, data)
                yield temporary, beside
            finally:
                with suppress(OSError):
                    os.unlink(beside, dir_fd=temporary)
        finally:
            os.close(temporary)

    def _link(self, beside: str, temporary: int, name: str, final: int, key: str) -> bool:
        try:
            os.link(beside, name, src_dir_fd=temporary, dst_dir_fd=final, follow_symlinks=False)
        except FileExistsError:
            # A network file system may have lost its answer to the link that it made, and have tried again.
            if os.stat(beside, dir_fd=temporary, follow_symlinks=False).st_nlink < 2:
                return False
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise StorageError(
                    f"{self.root}: cannot link {key} to its name: {error.strerror}; expected a writable file "
                    "system with hard links, by which a name is given once and never overwritten; use another one"
                ) from error
            raise
        if self.created is not None:
            self.created.file(key)
        return True

    def _declared_dead(self, run: str) -> StorageError:
        return StorageError(
            f"{self.root}: the temporary folder {paths.TEMPORARY}/{run} does not exist: the run holds no lease, "
            "or was declared dead and collected; start the command again"
        )

    def _sync_folders(self, folder: str, descriptor: int) -> None:
        """Sync `folder`, and every folder above it, up to the root, that this process has not synced yet."""
        os.fsync(descriptor)
        if len(self._durable) > _KNOWN_FOLDERS:
            self._durable.clear()
        while folder and folder not in self._durable:
            above = folder.rpartition("/")[0]
            with self.folder(above) as parent:
                os.fsync(parent)
            self._durable.add(folder)
            folder = above

    def _error(self, error: OSError, key: str, action: str) -> Exception:
        """The error to raise for what the operating system said."""
        if isinstance(error, FileNotFoundError | NotADirectoryError) and action in ("read", "list"):
            return FileNotFoundError(errno.ENOENT, "no such object in the cache", f"{self.root}/{key}")
        reason = error.strerror or type(error).__name__
        if error.errno in FULL:
            return FullDiskError(f"{self.root}: cannot {action} {key}: {reason}; free some space and start again")
        if error.errno in FAULTS:
            return StorageFault(
                f"{self.root}: cannot {action} {key}: {reason}; the disk or network failed: start the same command "
                "again once it works"
            )
        advice = ""
        if error.errno == errno.ENOENT and action == "create":
            advice = "; that place takes no new folders: choose another `out`"
        elif error.errno == errno.ENOENT:
            advice = "; this run's temporary files or the cache itself were removed; start the command again"
        if error.errno == errno.EMFILE:
            advice = "; allow this process more of them with `ulimit -n`"
        return StorageError(f"{self.root}: cannot {action} {key}: {reason}{advice}")


def _write_synced(descriptor: int, data: Data) -> None:
    """Write all of `data`, make it durable, and close the descriptor."""
    try:
        view = memoryview(data).cast("B")
        _write_all(descriptor, view[: len(view) // 2])
        failpoint("publish.temporary")
        _write_all(descriptor, view[len(view) // 2 :])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


def _exists(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
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
    if error.errno == errno.ELOOP:
        return LinkError(f"cannot write {path}: it is a symbolic link, which is not followed; remove it")
    if error.errno in FAULTS:
        return StorageFault(f"cannot write {path}: {error.strerror}; start again once the disk or network works")
    return StorageError(f"cannot write {path}: {error.strerror}")
