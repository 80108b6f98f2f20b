"""Files of runs and exports: written so that a crash leaves the old one or the new one, read and removed without links.

A run or an export may be anybody's: no symbolic link in it is followed, and only regular files of bounded size are
read. What is removed is what was made here, by name.
"""

import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from kpu.errors import ConfigError, FullDiskError, LinkError, StorageError, StorageFault
from kpu.storage import beneath
from kpu.storage.leases import close_lock
from kpu.storage.local import FULL, sync_folder
from kpu.util.digests import DIGEST_BYTES
from kpu.util.faults import FAULTS

MOST_BYTES: Final = 2**36
"""Of one file of tensors of a run or an export; a model of 16e9 parameters has as many. Documents have less."""
_MOST_BY_KIND: Final = {".json": 2**28, ".jsonl": 2**30, ".yaml": 2**20, ".py": 2**24, ".md": 2**24}
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_OPEN: Final = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def read_file(path: Path) -> bytes:
    """The whole of a regular file.

    Raises:
        LinkError: it is a link, pipe or device.
        CorruptError: it is too large to be one of ours.
        OSError: it cannot be read.
    """
    return beneath.read_file(path, _MOST_BY_KIND.get(path.suffix, MOST_BYTES))


def digest_file(path: Path) -> str:
    """The digest of a regular file, read in pieces. Raises as `read_file`."""
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for piece in beneath.read_pieces(path, _MOST_BY_KIND.get(path.suffix, MOST_BYTES)):
        state.update(piece)
    return state.hexdigest()


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Check that no folder of ours in `folder`, if it is there, is a link to another place.

    Raises:
        LinkError: naming it.
    """
    for name in names:
        if (folder / name).is_symlink():
            raise LinkError(
                f"{folder}: expected a folder of its own, found the symbolic link {name} (to "
                f"{str((folder / name).readlink())!r}), which is not followed: it may lead anywhere; put there what it "
                "leads to"
            )


def replace_file(path: Path, data: bytes) -> None:
    """Write beside, sync, rename.

    Raises:
        FullDiskError: no space is left. What stood at `path` stays.
        StorageError: it cannot be written there.
    """
    beside = _beside(path)
    try:
        _write(beside, data)
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise write_error(error, path) from error


def publish_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder with all `files` in it, or none; an existing one is replaced. Raises as `replace_file`."""
    beside, former = _beside(path), _beside(path)
    try:
        beside.mkdir(parents=True)
        for name, data in files.items():
            _write(beside / name, data)
        sync_folder(beside)
        if path.exists():
            path.rename(former)
        beside.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        remove_made(beside, files)
        raise write_error(error, path) from error
    remove_folder(path.parent, former.name)


def remove_made(folder: Path, names: Iterable[str]) -> None:
    """Remove files of these names from a folder, and then the folder if it is empty. What fails to go stays."""
    for name in names:
        with suppress(OSError):
            (folder / name).unlink()
    with suppress(OSError):
        folder.rmdir()


def remove_folder(parent: Path, key: str) -> None:
    """Remove the folder `key` below `parent` with all that is in it. No link is followed; what fails to go stays."""
    above, _, name = key.rpartition("/")
    with suppress(OSError, StorageError):
        descriptor = beneath.open_folder(os.path.realpath(parent), above)
        try:
            beneath.remove_tree(name, descriptor)
        finally:
            os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, which is made where it is missing.

    Raises:
        StorageError: it cannot be written there, or is a link.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | _OPEN, 0o666)
        with open(descriptor, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise write_error(error, path) from error


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which stays, while this process lives.

    Raises:
        ConfigError: another process holds it.
        StorageError: it cannot be made, or is a link.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | _OPEN, 0o666)
    except OSError as error:
        raise write_error(error, path) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        close_lock(descriptor)
        raise ConfigError(
            f"{path.parent}: the directory is locked by another process; wait until that has ended, or choose "
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
    if error.errno == errno.ELOOP:
        return LinkError(f"{path}: cannot write: it is a symbolic link, which is not followed; remove it")
    if error.errno in FAULTS:
        return StorageFault(
            f"{path}: cannot write: {error.strerror}; give the same command again once the disk or network works, "
            "`fit` with --resume"
        )
    return StorageError(f"{path}: cannot write: {error.strerror}; choose another folder, or give permission")


def _beside(path: Path) -> Path:
    """A name in the same folder that nobody has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


def _write(path: Path, data: bytes) -> None:
    with open(os.open(path, _NEW, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
