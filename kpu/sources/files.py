"""Random access to the files below a source's root, local or on any file system that fsspec knows."""

import errno
import os
import posixpath
import re
import stat
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from kpu.errors import SourceError
from kpu.storage.places import STORES, redact
from kpu.util.faults import error_code, is_fault

T = TypeVar("T")

DELAYS: Final = (0.1, 0.5, 2.0)
"""Seconds to wait before each further attempt at a read that failed for a reason that may pass."""

_UTF8: Final = sys.getfilesystemencoding().lower() == "utf-8"
MOST_BYTES: Final = 2**31
"""Of one image or one piece; more is not read into memory."""

_OPEN_FILES: Final = 64
_EMPTY: Final = frozenset({"InvalidRange", "416"})  # what an object without a byte answers to a request for some
_ESCAPED: Final = re.compile(rb"\\x([89a-f][0-9a-f])")


class Piece(NamedTuple):
    """Bytes wanted: `length` from `offset`, or the whole file where `length` is None. `key` names them in messages."""

    file: str
    key: str
    offset: int = 0
    length: int | None = None


class ShortRead(Exception):
    """A file ends before the piece asked for."""


class NotReadable(Exception):
    """It is not a regular file, or holds more than is read into memory."""


def printable(name: str) -> str:
    """A name as valid Unicode: bytes that are not UTF-8 become \\xNN, which `Files` understands when it opens."""
    return to_bytes(name).decode("utf-8", "backslashreplace")


def to_text(name: str) -> str:
    """A path as Python gives it, in UTF-8 whatever the locale says: keys are the same under every locale."""
    return name if _UTF8 else os.fsencode(name).decode("utf-8", "surrogateescape")


def to_name(path: str) -> str:
    """A path from a configuration, which is UTF-8, as Python names it under this locale; the inverse of `to_text`."""
    if _UTF8:
        return path
    in_utf8 = os.fsdecode(to_bytes(path))
    try:
        return in_utf8 if not os.path.lexists(path) and os.path.lexists(in_utf8) else path
    except UnicodeEncodeError:
        return in_utf8


def to_bytes(text: str) -> bytes:
    """What the file system knows a path by that `to_text` gave."""
    return text.encode("utf-8", "surrogateescape")


def is_local(path: str) -> bool:
    """Whether this machine's file system owns the path, and not a URL's."""
    return "://" not in path


def file_system(path: str, option: str = "data.source") -> tuple[Any, str]:
    """The fsspec file system that owns a path or URL, and the path in its terms; `option` is what gave it.

    Raises:
        SourceError: the protocol is unknown, or its package is not installed.
    """
    if is_local(path):  # `::` in it is part of a name
        return LocalFileSystem(), str(LocalFileSystem._strip_protocol(path))
    try:
        return url_to_fs(path)  # type: ignore[no-any-return]
    except (ValueError, ImportError) as error:
        expected = "expected a local path or a URL that fsspec knows, such as s3://bucket/folder"
        raise SourceError(f"{option}: {redact(path)}: {expected}; found: {redact(str(error))}") from None


class Files:
    """The files below `root`, a local folder or a URL. Safe to use from several threads, after pickling and forking."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.local = is_local(root)
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._system: tuple[Any, str] | None = None

    def __getstate__(self) -> str:
        return self.root

    def __setstate__(self, root: str) -> None:
        self.__init__(root)  # type: ignore[misc]

    @property
    def system(self) -> tuple[Any, str]:
        """The fsspec file system and the root in its terms. Never one of the process that this was forked from."""
        if self._pid != os.getpid():
            self._reset()
        if self._system is None:
            self._system = file_system(self.root)
        return self._system

    def path(self, file: str) -> str:
        """The place of `file`, in the file system's own terms.

        Raises:
            SourceError: it would lie outside the root.
        """
        if file.startswith("/") or ".." in file.split("/") or "\0" in file:
            raise SourceError(
                f"{file!r}: expected a path below {redact(self.root)}; the sample table names a file outside it"
            )
        return posixpath.join(self.system[1], file)

    def name(self, file: str) -> str:
        """`file` as messages name it."""
        return f"{redact(self.root).rstrip('/')}/{file}"

    def size(self, file: str) -> int:
        """Size in bytes. Raises SourceError as `fetch` does."""
        path = self.path(file)
        return self.retry(
            lambda: os.stat(to_bytes(path)).st_size if self.local else int(self.system[0].size(path)),  # noqa: PTH116
            Piece(file, file),
        )

    def fetch(self, pieces: Sequence[Piece]) -> list[bytes]:
        """Read pieces, in order. A read that fails for a reason that may pass is tried again, with pauses.

        Raises:
            SourceError: naming the key and file: it vanished, shrank, may not be read, or every attempt failed.
        """
        found = self._fetch_once(pieces)
        for delay in (*DELAYS, None):
            failed = [i for i, value in enumerate(found) if isinstance(value, Exception)]
            for i in failed:
                if delay is None or not self._may_pass(found[i]):
                    raise self.failure(pieces[i], found[i])
            if not failed or delay is None:
                break
            time.sleep(delay)
            for i, value in zip(failed, self._fetch_once([pieces[i] for i in failed]), strict=True):
                found[i] = value
        return found

    def retry(self, action: Callable[[], T], piece: Piece) -> T:
        """The result of `action`, which reads `piece`; tried again, and failing, as `fetch` does."""
        for delay in DELAYS:
            try:
                return action()
            except Exception as error:
                if not self._may_pass(error):
                    raise self.failure(piece, error) from error
                time.sleep(delay)
        try:
            return action()
        except Exception as error:
            raise self.failure(piece, error) from error

    def failure(self, piece: Piece, error: Any) -> Exception:
        """What to raise for a read that failed for good."""
        if isinstance(error, SourceError | MemoryError):
            return error
        if isinstance(error, ShortRead):
            what = f"expected {piece.length} bytes at offset {piece.offset}, {error}: it shrank since it was listed"
        elif isinstance(error, FileNotFoundError | NotADirectoryError):
            what = "no such file (any more)"
        elif isinstance(error, PermissionError):
            what = "no permission to read it"
        elif isinstance(error, NotReadable):
            what = str(error)
        elif self._may_pass(error):
            what = f"{len(DELAYS) + 1} attempts to read it failed, the last with {type(error).__name__}: {error}"
        else:
            what = f"cannot be read: {type(error).__name__}: {error}"
        key = "" if piece.key == piece.file else f" (key {piece.key!r})"
        failure = SourceError(f"{self.name(piece.file)}{key}: {what}; restore it, then run the same command again")
        failure.__cause__ = error
        if isinstance(error, Exception) and is_fault(error):
            failure.exit_code = 1  # nothing is wrong with what was asked for
        return failure

    def _may_pass(self, error: Any) -> bool:
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError):
            return False
        if isinstance(error, SourceError | ShortRead | NotReadable | MemoryError):
            return False
        # Clients of object stores raise errors of their own, which need not be an OSError.
        return isinstance(error, OSError) or not self.local

    def _fetch_once(self, pieces: Sequence[Piece]) -> list[Any]:
        """For each piece its bytes, or the exception that came instead."""
        paths = [self.path(piece.file) for piece in pieces]
        if self.local:
            return [self._read(path, piece) for path, piece in zip(paths, pieces, strict=True)]
        # An object store gives no more than is asked for, however large the object is; other servers may not know how.
        bounded = self.root.partition("://")[0] in STORES
        whole = (0, MOST_BYTES + 1) if bounded else (None, None)
        ranges = [whole if p.length is None else (p.offset, p.offset + p.length) for p in pieces]
        found = self.system[0].cat_ranges(paths, *map(list, zip(*ranges, strict=True)), on_error="return")
        return [_whole(piece, value) for piece, value in zip(pieces, found, strict=True)]

    def _read(self, path: str, piece: Piece) -> bytes | Exception:
        try:
            if piece.length is None:
                whole = _open(path)
                return _whole(piece, whole.read(0, min(whole.size, MOST_BYTES + 1)))
            if piece.length > MOST_BYTES:
                return NotReadable(f"expected at most {MOST_BYTES:,} bytes at once, found {piece.length:,} asked for")
            return _whole(piece, self._descriptor(path).read(piece.offset, piece.length))
        except OSError as error:
            with self._lock:  # a stale handle would fail forever
                self._open.pop(path, None)
            return error
        except NotReadable as error:
            return error

    def _descriptor(self, path: str) -> "_Descriptor":
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
        opened = _open(path)
        with self._lock:
            self._open[path] = opened
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return opened


def _whole(piece: Piece, value: bytes | Exception) -> bytes | Exception:
    if isinstance(value, Exception):
        return b"" if piece.length is None and error_code(value) in _EMPTY else value
    if len(value) > MOST_BYTES:
        return NotReadable(f"expected at most {MOST_BYTES:,} bytes, found more; leave it out")
    return value if piece.length in (None, len(value)) else ShortRead(f"found {len(value)}")


def require_regular(path: str | bytes) -> None:
    """Check that a local path leads to a regular file, which whoever opens it does not wait for.

    Raises:
        NotReadable: it is a pipe, socket or device.
        OSError: there is nothing, or a folder.
    """
    _require_regular(os.stat(path))  # noqa: PTH116


def _require_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise NotReadable("expected a regular file, found a pipe, socket or device, which is not read; remove it")


class _Descriptor:
    """An open file of this machine. It closes with its last user, not before: another thread may still be reading."""

    def __init__(self, path: bytes) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        status = os.fstat(self.number)
        _require_regular(status)
        os.set_blocking(self.number, True)  # a file that lies on tape, say, is waited for
        self.size = status.st_size

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes, fewer only where the file ends."""
        data = os.pread(self.number, length, offset)
        while 0 < len(data) < length:  # one call gives 2 GiB at most
            more = os.pread(self.number, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


def _open(path: str) -> _Descriptor:
    name = to_bytes(path)
    try:
        return _Descriptor(name)
    except FileNotFoundError:
        raw = _ESCAPED.sub(lambda match: bytes.fromhex(match[1].decode()), name)
        if raw == name:
            raise
        return _Descriptor(raw)
