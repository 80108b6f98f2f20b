"""Files and folders below a root, opened without ever following a symbolic link out of it.

What others made may hold links to anywhere: the root is the user's own way of naming a place, what lies below is not.
Linux resolves a whole path in one call that refuses links (`openat2`, since 5.6); elsewhere each folder on the way is
opened in turn. Pipes and devices are opened without waiting, and refused.
"""

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Final

from kpu.errors import CorruptError, LinkError, StorageError

_OPENAT2: Final = 437  # the same number on every architecture but Alpha
_AT_FDCWD: Final = -100
_NO_SYMLINKS: Final = 0x04
_FILE: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_DEEPEST: Final = 64  # folders within one another; a cache has fewer than 20
_PIECE: Final = 2**20
_BUSY: Final = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY})

Made = Callable[[str], None]


def open_file(root: str, key: str) -> tuple[int, int]:
    """A descriptor of the regular file `key` below `root`, to read from, and its size in bytes.

    Args:
        root: an absolute path without links (`os.path.realpath`).
        key: relative to it.

    Raises:
        LinkError: a link lies on the way, or it is a pipe, socket or device.
        OSError: it cannot be opened; IsADirectoryError where it is a folder.
    """
    try:
        descriptor = _open(root, key, _FILE)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a device that nothing drives
            raise LinkError(_irregular(root, key)) from None
        raise
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        os.set_blocking(descriptor, True)  # a file that lies on tape, say, is waited for
        return descriptor, status.st_size
    os.close(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), f"{root}/{key}")
    raise LinkError(_irregular(root, key))


def read_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """The whole of a regular file of at most `limit` bytes, which is no link itself; the way there may have some.

    Raises:
        LinkError: it is a link, pipe, socket or device.
        CorruptError: it is larger.
        OSError: it cannot be read.
    """
    with _opened(path, limit) as (descriptor, size):
        return read_all(descriptor, size)


def read_pieces(path: str | os.PathLike[str], limit: int) -> Iterator[bytes]:
    """The content of a file in pieces of a megabyte. Raises as `read_file`."""
    with _opened(path, limit) as (descriptor, _):
        while piece := os.read(descriptor, _PIECE):
            yield piece


@contextmanager
def _opened(path: str | os.PathLike[str], limit: int) -> Iterator[tuple[int, int]]:
    """A descriptor of a file, and its size."""
    folder, _, name = os.fspath(path).rpartition("/")
    descriptor, size = open_file(os.path.realpath(folder or "."), name)
    try:
        if size > limit:
            raise CorruptError(os.fspath(path), f"holds {size:,} bytes: expected at most {limit:,}, so it is not read")
        yield descriptor, size
    finally:
        os.close(descriptor)


def read_all(descriptor: int, size: int) -> bytes:
    """All that is left in an open file, which should be `size` bytes."""
    data = os.read(descriptor, size + 1)
    while len(data) < size:  # a signal, or more than the kernel gives at once
        more = os.read(descriptor, size + 1 - len(data))
        if not more:
            break
        data += more
    return data


def open_folder(root: str, key: str) -> int:
    """A descriptor of the folder `key` below `root`; the root itself if `key` is empty. Raises as `open_file`."""
    return _open(root, key, _FOLDER)


def make_folder(root: str, key: str, made: Made | None = None) -> int:
    """As `open_folder`; what is missing below `root` is made, and `made` is called with the key of each new folder."""
    with suppress(FileNotFoundError):
        return open_folder(root, key)
    descriptor, done = os.open(root, _FOLDER), ""
    for part in key.split("/"):
        done = f"{done}/{part}" if done else part
        try:
            with suppress(FileExistsError):
                os.mkdir(part, dir_fd=descriptor)
                if made is not None:
                    made(done)
            below = _step(root, done, part, _FOLDER, descriptor)
        finally:
            os.close(descriptor)
        descriptor = below
    return descriptor


def status_of(root: str, key: str) -> os.stat_result:
    """The status of what `key` names. Raises as `open_file`, but for what it is."""
    folder, _, name = key.rpartition("/")
    descriptor = open_folder(root, folder)
    try:
        found = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    finally:
        os.close(descriptor)
    if stat.S_ISLNK(found.st_mode):
        raise LinkError(_linked(root, key))
    return found


def remove_tree(name: str, folder: int) -> int:
    """Delete the folder `name` in the folder that the descriptor `folder` is of; bytes freed. No link is followed.

    What another process holds open, which network file systems keep under another name, stays for the next time.

    Raises:
        StorageError: folders are nested too deeply to be a cache's.
        OSError: something cannot be removed.
    """
    return _remove_tree(name, folder, _DEEPEST)


def _remove_tree(name: str, folder: int, depth: int) -> int:
    if not depth:
        raise StorageError(f"{name}: more than {_DEEPEST} folders within one another: no cache has them; remove them")
    descriptor = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
    freed = 0
    try:
        with os.scandir(descriptor) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for each, is_folder in found:
            with suppress(FileNotFoundError):
                freed += _remove_tree(each, descriptor, depth - 1) if is_folder else _remove_file(each, descriptor)
    finally:
        os.close(descriptor)
    _unless_busy(lambda: os.rmdir(name, dir_fd=folder))
    return freed


def _remove_file(name: str, folder: int) -> int:
    size = os.stat(name, dir_fd=folder, follow_symlinks=False).st_size
    return size if _unless_busy(lambda: os.unlink(name, dir_fd=folder)) else 0


def _unless_busy(remove: Callable[[], None]) -> bool:
    try:
        remove()
    except OSError as error:
        if error.errno not in _BUSY:
            raise
        return False
    return True


def _open(root: str, key: str, flags: int) -> int:
    path = f"{root}/{key}" if key else root
    opener = _opener()
    if opener is None:
        return _walk(root, key, flags)
    number = opener(path, flags)
    if number >= 0:
        return number
    if -number == errno.ELOOP:
        raise LinkError(_linked(root, key))
    raise OSError(-number, os.strerror(-number), path)


def _walk(root: str, key: str, flags: int) -> int:
    descriptor, done = os.open(root, _FOLDER if key else flags), ""
    parts = key.split("/") if key else []
    for number, part in enumerate(parts, start=1):
        done = f"{done}/{part}" if done else part
        try:
            below = _step(root, done, part, flags if number == len(parts) else _FOLDER, descriptor)
        finally:
            os.close(descriptor)
        descriptor = below
    return descriptor


def _step(root: str, done: str, part: str, flags: int, folder: int) -> int:
    """Open `part` of a folder, which is `done` below the root."""
    try:
        return os.open(part, flags | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK):  # which of them depends on the system
            with suppress(OSError):
                if stat.S_ISLNK(os.stat(part, dir_fd=folder, follow_symlinks=False).st_mode):
                    raise LinkError(_linked(root, done)) from None
        raise


def _linked(root: str, key: str) -> str:
    """What to say of a link on the way to `key`."""
    done, target = "", ""
    for part in key.split("/"):
        done = f"{done}/{part}" if done else part
        with suppress(OSError):
            target = os.readlink(f"{root}/{done}")  # noqa: PTH115
            break
    return (
        f"{root}: expected files and folders of its own, found the symbolic link {done} (to {target!r}), which is not "
        "followed: it may lead anywhere; put there what it leads to (`cp -rL` copies a folder with its links resolved, "
        "`hf download --local-dir` downloads one without links)"
    )


def _irregular(root: str, key: str) -> str:
    return f"{root}: expected a regular file {key}, found a pipe, socket or device, which is not opened; remove it"


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


@cache
def _opener() -> Callable[[str, int], int] | None:
    """Opens (path, flags) without following any link, in one system call: a descriptor, or a negative error number.

    None if the system cannot.
    """
    if os.uname().sysname != "Linux" or os.uname().machine.startswith("alpha"):
        return None
    try:
        syscall: Any = ctypes.CDLL(None, use_errno=True).syscall
    except (OSError, AttributeError):
        return None

    def opener(path: str, flags: int) -> int:
        how = _How(flags, 0, _NO_SYMLINKS)
        raw = os.fsencode(path)
        while True:
            number: int = syscall(
                ctypes.c_long(_OPENAT2), ctypes.c_int(_AT_FDCWD), raw, ctypes.byref(how), ctypes.c_size_t(24)
            )
            if number >= 0:
                return number
            failed = ctypes.get_errno()
            if failed not in (errno.EINTR, errno.EAGAIN):
                return -failed

    number = opener("/", _FOLDER)
    if number < 0:  # an older kernel, or a container that forbids the call
        return None
    os.close(number)
    return opener
