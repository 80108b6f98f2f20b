"""A folder of images. The order is that of sorted names, depth first, and needs one folder's names at a time.

The sub-folders of each source folder are its classes, if images lie in them, numbered by sorted name over all source
folders. Images directly in a source folder have no label.
"""

import os
import posixpath
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple

import pyarrow as pa

from kpu.errors import SourceError
from kpu.format.plan import SourceSpec
from kpu.records.leftout import NOT_REGULAR, Tally, describe_left_out
from kpu.sources.files import Files, Piece, printable, to_bytes, to_text
from kpu.sources.formats import IMAGES, extension
from kpu.sources.locate import Located
from kpu.sources.tables import BATCH_ROWS, sample_batch

_CIRCLE: Final = "linked to a folder that holds it"


class _Item(NamedTuple):
    name: str
    is_folder: bool


class _Content(NamedTuple):
    """What a folder holds: images and folders, names that are left out, and what is neither file nor folder."""

    items: list[_Item]
    others: list[str]
    odd: list[str]


class FolderListing:
    """The images below some folders, or some image files."""

    unique_keys = False
    images = IMAGES

    def __init__(self, located: Located) -> None:
        self._located, self._files, self._entries = located, located.files, located.entries
        self.tally = Tally()
        self.spec = SourceSpec(kind="folder", root=self._files.root)

    @cached_property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the sub-folders that hold images, or None if none does."""
        names, uncounted = set(), Tally()
        for entry in self._entries:
            if entry.is_folder:
                for item in self._items(entry.path, uncounted):
                    below = posixpath.normpath(posixpath.join(entry.path, item.name))
                    if item.is_folder and next(self._walk(below, uncounted), None) is not None:
                        names.add(printable(item.name))
        return tuple(sorted(names)) or None

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Columns key, file (equal to key) and label."""
        tally = self.tally = Tally(self._located.left_out)
        numbers = {name: number for number, name in enumerate(self.classes or ())}
        names: list[str] = []
        labels: list[int | None] = []
        for entry in self._entries:
            inner = "" if entry.path == "." else f"{entry.path}/"
            for file in self._walk(entry.path, tally) if entry.is_folder else (entry.path,):
                first, slash, _ = file[len(inner) :].partition("/")
                names.append(file)
                labels.append(numbers.get(printable(first)) if slash and entry.is_folder else None)
                if len(names) == BATCH_ROWS:
                    yield _batch(names, labels)
                    names, labels = [], []
        if names:
            yield _batch(names, labels)

    def nothing(self) -> str:
        """What to say where there is no image."""
        found = describe_left_out(self.tally.result())
        return (
            f"{self._files.root}: holds no image ({', '.join(sorted(self.images))}); "
            "shards in sub-folders are named by a pattern, such as '<folder>/**/*.tar' or '<folder>/**/*.parquet'"
            + (f"; {found}" if found else "")
        )

    def _walk(self, folder: str, tally: Tally, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
        """Images below a folder. `above` identifies the folders that it lies in, to see links that lead back."""
        if self._files.local:
            place = to_bytes(self._path(folder))
            status = self._files.retry(lambda: os.stat(place), Piece(folder, folder))  # noqa: PTH116
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                tally.add(_CIRCLE, folder)
                return
            above = (*above, identity)
        for item in self._items(folder, tally):
            path = item.name if folder == "." else f"{folder}/{item.name}"
            if item.is_folder:
                yield from self._walk(path, tally, above)
            else:
                yield path

    def _path(self, folder: str) -> str:
        return self._files.system[1] if folder == "." else self._files.path(folder)

    def _items(self, folder: str, tally: Tally) -> list[_Item]:
        """Images and folders in a folder, sorted by name; what is left out is counted."""
        path = self._path(folder)
        content = self._files.retry(
            lambda: self._local(path) if self._files.local else self._remote(path), Piece(folder, folder)
        )
        inner = "" if folder == "." else f"{folder}/"
        for name in sorted(content.others):
            tally.add_file(inner + printable(name))
        for name in sorted(content.odd):
            tally.add(NOT_REGULAR, inner + printable(name))
        return sorted(content.items)

    def _remote(self, path: str) -> _Content:
        system = self._files.system[0]
        listing: list[dict[str, Any]] = system.ls(path, detail=True)
        system.invalidate_cache(path)  # of a large source it would hold every name
        found = _Content([], [], [])
        for item in listing:
            full, is_folder = item["name"].rstrip("/"), item["type"] == "directory"
            if full != path.rstrip("/"):
                self._sort(posixpath.basename(full), is_folder, found)
            elif is_folder:  # else it is the folder's own marker object, which object stores list among its content
                self.refuse_nameless(path)
        return found

    def refuse_nameless(self, path: str) -> None:
        """Refuse keys such as `folder//image.jpg`: no listing by folders shows them."""
        raise SourceError(
            f"{self._files.root}: holds keys with nothing between two slashes ({path.rstrip('/')}//...), which cannot "
            "be listed as a folder; copy them to keys without `//`, or name the folders that are meant"
        )

    def _sort(self, name: str, is_folder: bool, into: _Content) -> bool:
        """Whether a name is listed; if not it is left out."""
        listed = not name.startswith(".") and (is_folder or extension(name) in self.images)
        if listed:
            into.items.append(_Item(name, is_folder))
        else:
            into.others.append(name)
        return listed

    def _local(self, path: str) -> _Content:
        found = _Content([], [], [])
        with os.scandir(os.fsdecode(to_bytes(path))) as entries:
            for entry in entries:
                name, is_folder = to_text(entry.name), entry.is_dir()
                if not self._sort(name, is_folder, found) or is_folder or entry.is_file():
                    continue
                if entry.is_symlink():
                    target = os.readlink(entry.path)  # noqa: PTH115
                    raise SourceError(f"{entry.path}: is a link to {target}, which is not there; restore or remove it")
                found.items.pop()  # a pipe or device would block its reader
                found.odd.append(name)
        return found


def _batch(names: Sequence[str], labels: Sequence[int | None]) -> pa.RecordBatch:
    try:
        keys = pa.array(names, pa.string())
    except UnicodeEncodeError:
        keys = pa.array([printable(name) for name in names], pa.string())
    return sample_batch("folder", keys, [keys], pa.array(labels, pa.int64()))


class FolderReader:
    """Reads whole files."""

    def __init__(self, spec: SourceSpec) -> None:
        self._files = Files(spec.root)

    def read(self, table: pa.Table) -> list[bytes]:
        """Encoded bytes of each row, in order. Raises SourceError for a file that is gone or unreadable."""
        keys, files = table["key"].to_pylist(), table["file"].to_pylist()
        return self._files.fetch([Piece(file, key) for file, key in zip(files, keys, strict=True)])
