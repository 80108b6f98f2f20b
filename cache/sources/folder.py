"""A folder of images. The order is that of sorted names, depth first, and needs one folder's names at a time.

The sub-folders of each source folder are its classes, if images lie in them, numbered by sorted name over all source
folders. Images directly in a source folder have no label.
"""

import os
import posixpath
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from cache.errors import SourceError
from cache.sources.files import Files, Piece, printable
from cache.sources.locate import IMAGES, Located, extension
from cache.sources.tables import BATCH_ROWS, sample_batch
from cache.spec import SourceSpec


class _Item(NamedTuple):
    name: str
    is_folder: bool


class FolderListing:
    """The images below some folders, or some image files."""

    unique_keys = False

    def __init__(self, located: Located) -> None:
        self._files, self._entries = located.files, located.entries
        self.spec = SourceSpec(kind="folder", root=self._files.root)

    @cached_property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the sub-folders that hold images, or None if none does."""
        names = set()
        for entry in self._entries:
            if entry.is_folder:
                for item in self._names(entry.path):
                    below = posixpath.normpath(posixpath.join(entry.path, item.name))
                    if item.is_folder and next(self._walk(below), None) is not None:
                        names.add(printable(item.name))
        return tuple(sorted(names)) or None

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Columns key, file (equal to key) and label."""
        numbers = {name: number for number, name in enumerate(self.classes or ())}
        names: list[str] = []
        labels: list[int | None] = []
        for entry in self._entries:
            inner = "" if entry.path == "." else f"{entry.path}/"
            for file in self._walk(entry.path) if entry.is_folder else (entry.path,):
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
        return (
            f"{self._files.root}: holds no image ({', '.join(sorted(IMAGES))}); "
            "shards in sub-folders are named by a pattern, such as '<folder>/**/*.tar' or '<folder>/**/*.parquet'"
        )

    def _walk(self, folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
        """Images below a folder. `above` identifies the folders that it lies in, to see links that lead back."""
        if self._files.local:
            status = self._files.retry(lambda: Path(self._path(folder)).stat(), Piece(folder, folder))
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                return
            above = (*above, identity)
        for item in self._names(folder):
            path = item.name if folder == "." else f"{folder}/{item.name}"
            if item.is_folder:
                yield from self._walk(path, above)
            else:
                yield path

    def _path(self, folder: str) -> str:
        return self._files.system[1] if folder == "." else self._files.path(folder)

    def _names(self, folder: str) -> list[_Item]:
        """Images and folders in a folder, sorted by name, hidden ones left out."""
        path = self._path(folder)
        items = self._files.retry(
            lambda: _local(path) if self._files.local else self._remote(path), Piece(folder, folder)
        )
        return sorted(items)

    def _remote(self, path: str) -> list[_Item]:
        system = self._files.system[0]
        listing: list[dict[str, Any]] = system.ls(path, detail=True)
        system.invalidate_cache(path)  # of a large source it would hold every name
        items = (_Item(posixpath.basename(item["name"].rstrip("/")), item["type"] == "directory") for item in listing)
        # Object stores list a folder's own marker object among its content.
        return [
            item
            for item, found in zip(items, listing, strict=True)
            if found["name"].rstrip("/") != path.rstrip("/") and _listed(item.name, item.is_folder)
        ]


def _listed(name: str, is_folder: bool) -> bool:
    return bool(name) and not name.startswith(".") and (is_folder or extension(name) in IMAGES)


def _local(path: str) -> list[_Item]:
    items = []
    with os.scandir(path) as entries:
        for entry in entries:
            is_folder = entry.is_dir()
            if not _listed(entry.name, is_folder):
                continue
            if not is_folder and not entry.is_file():
                if entry.is_symlink():
                    target = os.readlink(entry.path)  # noqa: PTH115
                    raise SourceError(f"{entry.path}: is a link to {target}, which is not there; restore or remove it")
                continue  # a pipe or device would block its reader
            items.append(_Item(entry.name, is_folder))
    return items


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
