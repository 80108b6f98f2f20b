"""Who is alive: a run holds a lock on its temporary folder, and what dead runs left is collected.

Locks are `flock`s of the local file system. Object stores have none: their puts leave no temporaries behind.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from cache import layout
from cache.localstore import LocalStorage, write_error
from cache.storage import Storage, check_key

_LEASE: Final = "lease"
_BUSY: Final = frozenset({errno.EWOULDBLOCK, errno.EACCES})


@contextmanager
def lease(storage: Storage, run: str) -> Iterator[None]:
    """Make the temporary folder of `run`, and hold its lease: until then, and while this process lives, gc spares it.

    The folder is removed at the end, unless something is left in it. Whoever publishes for this run in another
    process needs no lease of its own.
    """
    if not isinstance(storage, LocalStorage):
        yield
        return
    folder = storage.root / layout.TEMPORARY / check_key(run)
    with mutex(storage):  # so that gc never sees the folder without its lease
        descriptor = _take_new(folder)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / _LEASE).unlink()
            folder.rmdir()
        os.close(descriptor)


@contextmanager
def mutex(storage: Storage) -> Iterator[None]:
    """Wait for, and hold, the one lock among all processes and threads that use this cache.

    For short sections that look before they move or delete. Object stores have no such lock: nothing is held there.
    """
    if not isinstance(storage, LocalStorage):
        yield
        return
    path = storage.root / layout.TEMPORARY / "gc.lock"
    try:
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise write_error(error, path) from error
    try:
        with suppress(OSError):  # a file system without locks: the section runs unguarded
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def dead_runs(storage: Storage) -> list[str]:
    """Runs whose temporary folder stands and whose lease nobody holds, in alphabetical order."""
    if not isinstance(storage, LocalStorage):
        return []
    with mutex(storage):
        return [run for run in _runs(storage) if _is_dead(storage.root / layout.TEMPORARY / run)]


def collect_garbage(storage: Storage, *, quarantine: bool) -> int:
    """Remove what dead runs left below `.tmp`, and with `quarantine` what was moved aside; bytes freed."""
    freed = sum(storage.remove(f"{layout.TEMPORARY}/{run}") for run in dead_runs(storage))
    return freed + (storage.remove(layout.QUARANTINE) if quarantine else 0)


def _runs(storage: LocalStorage) -> list[str]:
    temporary = storage.root / layout.TEMPORARY
    aside = Path(layout.QUARANTINE).name
    return sorted(name for name in storage.names(layout.TEMPORARY) if name != aside and (temporary / name).is_dir())


def _take_new(folder: Path) -> int:
    """Make the folder with a locked lease in it; the descriptor that holds the lock."""
    try:
        folder.mkdir(parents=True)
        descriptor = os.open(folder / _LEASE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise write_error(error, folder) from error
    with suppress(OSError):  # a file system without locks: nobody else can take the lease either
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _is_dead(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / _LEASE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise write_error(error, folder) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks, where nobody can be declared dead
        return False
    finally:
        os.close(descriptor)
    return True
