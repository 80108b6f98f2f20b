"""Images that a Parquet file names by a path, without their bytes.

What a file says must not decide what is read: only plain paths below the source's root are followed, never URLs.
"""

import os
import posixpath
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kpu.errors import SourceError
from kpu.format.commits import ImageStatus
from kpu.pixels.refused import NoBytes
from kpu.sources.files import Files, Piece, is_local, to_bytes


class Named(NamedTuple):
    """A row of the Parquet file `table`, whose image is at `path`; `key` names it in messages."""

    table: str
    path: str
    key: str


def read_named(files: Files, rows: Sequence[Named]) -> list[bytes]:
    """The encoded bytes of each row, in order; `NoBytes` where no such file is below the source's root.

    Raises:
        SourceError: a file is there and cannot be read.
    """
    return [_read(files, row) for row in rows]


def _read(files: Files, row: Named) -> bytes:
    for file in _places(files.root, row):
        try:
            if files.local and not _is_file(files.path(file)):
                continue
            return files.fetch([Piece(file, row.key)])[0]
        except SourceError as error:
            if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError | IsADirectoryError):
                raise
    return NoBytes(ImageStatus.PATH_WITHOUT_FILE)


def _is_file(path: str) -> bool:
    """Whether an ordinary file is there: a pipe or device would block its reader."""
    try:
        return stat.S_ISREG(os.stat(to_bytes(path)).st_mode)  # noqa: PTH116
    except (OSError, ValueError):
        return False


def _places(root: str, row: Named) -> Iterator[str]:
    """Where the image may be, relative to the root: beside the Parquet file, then below the root."""
    if not is_local(row.path) or "\0" in row.path:
        return
    if posixpath.isabs(row.path):
        below = posixpath.normpath(row.path).removeprefix(root.rstrip("/") + "/")
        if not posixpath.isabs(below):
            yield below
        return
    for folder in dict.fromkeys((posixpath.dirname(row.table), "")):
        place = posixpath.normpath(posixpath.join(folder, row.path))
        if place not in (".", "..") and not place.startswith("../"):
            yield place
