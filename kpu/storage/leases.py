"""Who is alive: a run holds a lock on its temporary folder, and what dead runs left is collected.

Locks are `flock`s of the local file system. Object stores have none: their puts leave no temporaries behind.
"""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from kpu.errors import LinkError
from kpu.storage import paths
from kpu.storage.base import Storage, check_key
from kpu.storage.local import LocalStorage, write_error

_LEASE: Final = "lease"
MUTEX: Final = f"{paths.TEMPORARY}/gc.lock"
_ATTEMPTS: Final = 16
_LOCK: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_NEW: Final = _LOCK | os.O_CREAT | os.O_EXCL


@contextmanager
def lease(storage: Storage, run: str) -> Iterator[None]:
    """Make the temporary folder of `run`, and hold its lease: until then, and while this process lives, gc spares it.

    The folder is removed at the end, unless something is left in it. Whoever publishes for this run in another
    process needs no lease of its own.
    """
    if not isinstance(storage, LocalStorage):
        yield
        return
    folder = f"{paths.TEMPORARY}/{check_key(run)}"
    with mutex(storage):  # so that gc never sees the folder without its lease
        descriptor = _take_new(storage, folder)
    try:
        yield
    finally:
        # Closed first: network file systems keep a file that is removed while it is open, under another name.
        close_lock(descriptor)
        with suppress(OSError, LinkError), storage.folder(paths.TEMPORARY) as temporary:
            with storage.folder(folder) as own:
                os.unlink(_LEASE, dir_fd=own)
            os.rmdir(run, dir_fd=temporary)


@contextmanager
def mutex(storage: Storage) -> Iterator[None]:
    """Wait for, and hold, the one lock among all processes and threads that use this cache.

    For short sections that look before they move or delete. Object stores have no such lock: nothing is held there.
    """
    if not isinstance(storage, LocalStorage):
        yield
        return
    descriptor = _lock(storage)
    try:
        yield
    finally:
        close_lock(descriptor)


def dead_runs(storage: Storage) -> list[str]:
    """Runs with a temporary folder and a lease that nobody holds, in alphabetical order."""
    if not isinstance(storage, LocalStorage):
        return []
    with mutex(storage):
        return [run for run in _runs(storage) if _is_dead(storage, run)]


def live_runs(storage: Storage) -> list[str]:
    """Runs whose lease somebody holds, in alphabetical order."""
    if not isinstance(storage, LocalStorage):
        return []
    return [run for run in _runs(storage) if not _is_dead(storage, run)]


def collect_garbage(storage: Storage, *, quarantine: bool) -> int:
    """Remove what dead runs left below `.tmp`, and with `quarantine` what was moved aside; bytes freed."""
    freed = sum(storage.remove(f"{paths.TEMPORARY}/{run}") for run in dead_runs(storage))
    return freed + (storage.remove(paths.QUARANTINE) if quarantine else 0)


def _runs(storage: LocalStorage) -> list[str]:
    """Folders of runs, in alphabetical order; links and files there are none of ours."""
    aside = Path(paths.QUARANTINE).name
    try:
        with storage.folder(paths.TEMPORARY) as temporary, os.scandir(temporary) as entries:
            return sorted(each.name for each in entries if each.name != aside and each.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise write_error(error, storage.root / paths.TEMPORARY) from error


def _lock(storage: LocalStorage) -> int:
    """A descriptor of the lock file, which is made where it is missing, with the lock held."""
    try:
        for _ in range(_ATTEMPTS):
            with storage.folder(paths.TEMPORARY, make=True) as temporary:
                descriptor = _open_or_make(storage, temporary)
            with suppress(OSError):  # a file system without locks: the section runs unguarded
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:  # else it was removed while we waited, and another one may be held
                break
            close_lock(descriptor)
    except OSError as error:
        raise write_error(error, storage.root / MUTEX) from error
    return descriptor


def _open_or_make(storage: LocalStorage, temporary: int) -> int:
    name = MUTEX.rpartition("/")[2]
    while True:
        with suppress(FileNotFoundError):
            return os.open(name, _LOCK, dir_fd=temporary)
        with suppress(FileExistsError):
            descriptor = os.open(name, _NEW, 0o666, dir_fd=temporary)
            if storage.created is not None:
                storage.created.file(MUTEX)
            return descriptor


def _take_new(storage: LocalStorage, folder: str) -> int:
    """Make the folder with a locked lease in it; the descriptor that holds the lock."""
    try:
        with storage.folder(paths.TEMPORARY, make=True) as temporary:
            os.mkdir(folder.rpartition("/")[2], dir_fd=temporary)
        with storage.folder(folder) as own:
            descriptor = os.open(_LEASE, _NEW, 0o666, dir_fd=own)
    except OSError as error:
        raise write_error(error, storage.root / folder) from error
    with suppress(OSError):  # a file system without locks: nobody else can take the lease either
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _is_dead(storage: LocalStorage, run: str) -> bool:
    folder = f"{paths.TEMPORARY}/{run}"
    try:
        with storage.folder(folder) as own:
            descriptor = os.open(_LEASE, _LOCK, dir_fd=own)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise write_error(error, storage.root / folder / _LEASE) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise LinkError(f"{storage.root}: expected a regular file {folder}/{_LEASE}, found another; remove it")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks, where nobody can be declared dead
        return False
    finally:
        close_lock(descriptor)
    return True


def close_lock(descriptor: int) -> None:
    """Close a lock file: nothing was written to it that could be lost."""
    with suppress(OSError):
        os.close(descriptor)
