"""Whose Python may run: what the user named, what the user's list has, and anything where that was asked for.

A cache, a run and an exported student may name code, as `torch:<file.py or module>:<factory>`. Opening what a stranger
sent must not run it. The list is a text file of SHA-256 digests, one a line, as `sha256sum` prints them; `extract`,
`fit` and `export` add to it what the user named.
"""

import grp
import os
import pwd
import re
import shlex
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

VARIABLE: Final = "KPU_TRUSTED_CODE"
"""The environment variable that names another list."""
FLAG: Final = "give --trust-code"
LARGEST_SOURCE: Final = 16 * 2**20
"""Bytes of a source file."""
_LARGEST_LIST: Final = 64 * 2**20  # bytes
_TENSORS_ONLY: Final = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_ANYTHING: Final = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_LINE: Final = re.compile(rb"([0-9a-f]{64})(?:\s|$)")


@dataclass(frozen=True)
class Trust:
    """Which Python code may run; small and picklable, so that a driver decides for its workers.

    `listed` are SHA-256 digests of sources that are trusted wherever they are. `named` is what the user named in this
    very command (`Code.name`): that may import what lies beside it as well. `everything` lets all code run. `how` is
    what a message says to type.
    """

    listed: frozenset[str] = frozenset()
    named: frozenset[str] = frozenset()
    everything: bool = False
    how: str = FLAG


def load_trust(*, everything: bool = False, how: str = FLAG) -> Trust:
    """What the user's list allows; a list that is missing or cannot be read allows nothing."""
    return Trust(_listed(trust_list()), everything=everything, how=how)


def trust_list() -> Path | None:
    """Where the user's list is; None if there is no home folder."""
    own = os.environ.get(VARIABLE)
    try:
        if own:
            return Path(own).expanduser()
        given = os.environ.get("XDG_CONFIG_HOME") or (os.environ.get("APPDATA", "") if os.name == "nt" else "")
        folder = Path(given) if Path(given).is_absolute() else Path.home() / ".config"
    except RuntimeError:  # nobody knows the home folder
        return None
    return folder / "kpu" / "trusted-code"


def remember(code: Mapping[str, str]) -> str | None:
    """Add code, the places of files by SHA-256 digest, to the user's list; why not, where it cannot be added.

    Safe beside other writers: lines are appended in one write, and a line that was cut off is no digest.
    """
    place = trust_list()
    missing = code.keys() - _listed(place)
    if not missing:
        return None
    lines = "".join(f"{key}  {_printable(code[key])}\n" for key in sorted(missing))
    reason = "there is no home folder" if place is None else _append(place, lines.encode())
    if reason is None and missing <= _listed(place):
        return None
    why = reason or "others may write to it, or to its folder"
    return (
        f"the code that you named cannot be remembered in {place or 'a list'} ({why}): running it again from what was "
        f"made here needs --trust-code; {VARIABLE} names another list"
    )


def how_to_trust(key: str | None) -> str:
    """The command that adds a digest to the user's list, as a message says it; empty if there is no list."""
    place = trust_list()
    if place is None or key is None:
        return ""
    folder = "" if place.parent.is_dir() else f"mkdir -p {shlex.quote(str(place.parent))} && "
    return f"; to trust it from now on: {folder}echo {key} >> {shlex.quote(str(place))}"


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes: a pipe or a device would block, or never end.

    Raises:
        OSError: it is absent, cannot be read, is something else or larger.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "Not a regular file", str(path))
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(0, f"Larger than {limit:,} bytes", str(path))
    return data


@contextmanager
def tensors_only() -> Iterator[None]:
    """Have `torch.load` read nothing but tensors, whatever a library asks for: older releases of timm run pickles."""
    before = {name: os.environ.pop(name, None) for name in (_TENSORS_ONLY, _ANYTHING)}
    os.environ[_TENSORS_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[_TENSORS_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _listed(place: Path | None) -> frozenset[str]:
    try:
        if place is None or not all(_own(each) for each in (place, place.parent)):
            return frozenset()
        data = read_regular(place, _LARGEST_LIST)
    except OSError:
        return frozenset()
    return frozenset(match[1].decode() for match in map(_LINE.match, data.split(b"\n")) if match is not None)


def _own(place: Path) -> bool:
    """Whether nobody but the user, or root, can change what is at a place: whoever could would add his own code."""
    found = place.stat()
    sticky = stat.S_ISDIR(found.st_mode) and bool(found.st_mode & stat.S_ISVTX)
    others = bool(found.st_mode & stat.S_IWOTH) and not sticky
    group = bool(found.st_mode & stat.S_IWGRP) and not sticky and not _is_private(found.st_gid)
    return found.st_uid in (0, os.geteuid()) and not others and not group


def _is_private(gid: int) -> bool:
    """Whether a group is the one that many systems give each user for himself."""
    try:
        return grp.getgrgid(gid).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False


def _append(place: Path, lines: bytes) -> str | None:
    """Why it could not be done; None if it was."""
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(place, flags, 0o600)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                return "it is no regular file"
            os.lseek(descriptor, max(0, found.st_size - 1), os.SEEK_SET)
            begins = b"\n" if found.st_size and os.read(descriptor, 1) != b"\n" else b""
            os.write(descriptor, begins + lines)
        finally:
            os.close(descriptor)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _printable(place: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in place)
