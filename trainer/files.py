"""Writing files so that a crash leaves the old one or the new one, never a part."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cache.errors import ConfigError, FullDiskError, StorageError
from cache.leases import close_lock
from cache.localstore import FULL, sync_folder


def replace_file(path: Path, data: bytes) -> None:
    """Write beside, sync, rename.

    Raises:
        FullDiskError: no space is left. What stood at `path` stays.
        StorageError: it cannot be written there.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write(beside, data)
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise write_error(error, path) from error


def publish_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder with all `files` in it, or none; one that stands there is replaced. Raises as `replace_file`."""
    beside, former = (path.with_name(f".{path.name}.{end}") for end in (os.getpid(), "former"))
    try:
        for folder in (beside, former):
            shutil.rmtree(folder, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, data in files.items():
            _write(beside / name, data)
        sync_folder(beside)
        if path.exists():
            path.rename(former)
        beside.rename(path)
        sync_folder(path.parent)
        shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise write_error(error, path) from error


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which stays, while this process lives.

    Raises:
        ConfigError: another process holds it.
        StorageError: it cannot be made.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise write_error(error, path) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        close_lock(descriptor)
        raise ConfigError(
            f"{path.parent}: expected nobody else at work there, found another process; wait for its end, or choose "
            "another folder"
        ) from None
    except OSError:  # a file system without locks: nobody can be told apart
        pass
    try:
        yield
    finally:
        close_lock(descriptor)


def write_error(error: OSError, path: Path) -> StorageError:
    """What to raise for an operating system's refusal to write `path`."""
    if error.errno in FULL:
        return FullDiskError(
            f"{path}: cannot write: {error.strerror}; free some space and give the same command again, `fit` with "
            "--resume"
        )
    return StorageError(f"{path}: cannot write: {error.strerror}; choose another folder, or give permission")


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
