"""From `data.source` (a path, URL, glob, braces, or a list of them) to the files and folders that it names."""

import glob
import os
import posixpath
import stat
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import braceexpand

from cache.errors import SourceError
from cache.sources.files import Files, file_system, is_local

Kind = Literal["folder", "tar", "parquet"]

IMAGES: Final = frozenset(
    {"jpg", "jpeg", "jpe", "jfif"}
    | {"png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif"}
    | {"ppm", "pgm", "pbm", "pnm"}
)
_PARQUET: Final = (".parquet", ".pq")
_COMPRESSED: Final = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
_MAGIC: Final = "*?["


class Entry(NamedTuple):
    """One thing to list, relative to the root (`.` is the root itself)."""

    path: str
    is_folder: bool


class Located(NamedTuple):
    """What a source is made of, in the order given; globs are sorted."""

    kind: Kind
    files: Files
    entries: tuple[Entry, ...]


class _Found(NamedTuple):
    path: str
    kind: Kind | None
    is_folder: bool


def extension(name: str) -> str:
    """What follows the last dot, in lower case."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def locate(source: str | Sequence[str]) -> Located:
    """Find what `source` names, without listing image folders.

    Raises:
        SourceError: something does not exist, a pattern matches nothing, or different kinds are mixed.
    """
    patterns = [source] if isinstance(source, str) else list(source)
    if not patterns:
        raise SourceError("data.source: expected a path, a pattern or a list of them, found an empty list")
    found = [item for pattern in patterns for item in _expand(pattern)]
    kinds: defaultdict[Kind, list[str]] = defaultdict(list)
    for item in found:
        if item.kind is None:
            raise SourceError(
                f"data.source: {item.path}: expected a folder, a .tar, a .parquet or an image file "
                f"({', '.join(sorted(IMAGES))})"
            )
        kinds[item.kind].append(item.path)
    if len(kinds) > 1:
        examples = ", ".join(f"{paths[0]} ({kind})" for kind, paths in sorted(kinds.items()))
        raise SourceError(f"data.source: expected one kind of source, found {examples}; extract them apart")
    root = _common_root(found)
    entries = tuple(Entry(_relative(item.path, root), item.is_folder) for item in found)
    return Located(next(iter(kinds)), Files(root), entries)


def _expand(pattern: str) -> list[_Found]:
    if is_local(pattern):
        pattern = os.path.abspath(os.path.expanduser(pattern))  # noqa: PTH100, PTH111 - links stay unresolved
        if os.path.lexists(pattern):
            return _look(pattern, literal=True)
    try:
        paths = list(braceexpand.braceexpand(pattern)) if "{" in pattern else [pattern]
    except ValueError as error:
        raise SourceError(f"data.source: {pattern}: cannot expand its braces: {error}") from None
    found = []
    for path in paths:
        if not any(character in path for character in _MAGIC):
            found += _look(path, literal=True)
            continue
        matches = _glob(path)
        if not matches:
            raise SourceError(f"data.source: no file matches {path}")
        # Beside what it was meant for, a pattern often matches a README or an index.
        found += [item for match in matches for item in _look(match, literal=False) if item.kind is not None]
    if not found:
        raise SourceError(f"data.source: {pattern} matches no folder, .tar, .parquet or image file")
    return found


def _glob(pattern: str) -> list[str]:
    if is_local(pattern):
        return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - patterns are absolute
    system, path = file_system(pattern)
    return sorted(system.unstrip_protocol(match) for match in _ask(pattern, lambda: system.glob(path)))


def _look(path: str, *, literal: bool) -> list[_Found]:
    """What a path is: one file or image folder, or the shards in a folder of shards."""
    kind = _kind_by_name(path)
    if is_local(path):
        try:
            is_folder = stat.S_ISDIR(Path(path).stat().st_mode)
        except OSError as error:
            raise SourceError(f"data.source: {path}: {_absence(path, error)}") from None
    else:
        system, inner = file_system(path)
        path = system.unstrip_protocol(inner)
        # A shard that is not there shows when it is opened: asking for each of 100,000 of them first would take hours.
        is_folder = kind is None and bool(_ask(path, lambda: system.isdir(inner)))
        if kind is None and not is_folder and literal:
            raise SourceError(f"data.source: {path}: no such folder")
    if not is_folder:
        return [_Found(path, kind, is_folder=False)]
    names = _top_level(path)
    shards = [name for name, folder in names if not folder and _kind_by_name(name) in ("tar", "parquet")]
    others = [name for name, folder in names if folder or _kind_by_name(name) == "folder"]
    if shards and not others:
        return [_Found(f"{path.rstrip('/')}/{name}", _kind_by_name(name), is_folder=False) for name in sorted(shards)]
    return [_Found(path.rstrip("/") or "/", "folder", is_folder=True)]


def _top_level(path: str) -> list[tuple[str, bool]]:
    """Names in a folder, hidden ones left out, each with whether it is a folder."""
    if is_local(path):
        try:
            with os.scandir(path) as entries:
                return [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise SourceError(f"data.source: {path}: cannot list it: {error.strerror}") from None
    system, inner = file_system(path)
    listing: list[Any] = _ask(path, lambda: system.ls(inner, detail=True))
    names = [(posixpath.basename(item["name"].rstrip("/")), item["type"] == "directory") for item in listing]
    return [(name, folder) for name, folder in names if name and not name.startswith(".")]


def _ask(path: str, question: Callable[[], Any]) -> Any:
    """The answer of a remote file system. Clients raise errors of their own: no credentials, no network, no bucket."""
    try:
        return question()
    except Exception as error:
        raise SourceError(f"data.source: {path}: cannot be listed: {type(error).__name__}: {error}") from error


def _kind_by_name(path: str) -> Kind | None:
    name = path.lower()
    if name.endswith(".tar") or (name.endswith(_COMPRESSED) and (".tar." in name or extension(name).startswith("t"))):
        return "tar"
    if name.endswith(_PARQUET):
        return "parquet"
    return "folder" if extension(name) in IMAGES else None


def _absence(path: str, error: OSError) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"cannot be read: {error.strerror}"
    if os.path.islink(path):  # noqa: PTH114
        return f"is a link to {os.readlink(path)}, which does not exist"  # noqa: PTH115
    parent = os.path.dirname(path)  # noqa: PTH120
    while not os.path.exists(parent):  # noqa: PTH110
        parent = os.path.dirname(parent)  # noqa: PTH120
    return f"no such file or folder (what exists is {parent})"


def _common_root(found: Sequence[_Found]) -> str:
    folders = sorted({item.path if item.is_folder else posixpath.dirname(item.path) for item in found})
    owners = sorted({"" if is_local(folder) else folder.partition("://")[0] for folder in folders})
    if len(owners) > 1:
        raise SourceError(f"data.source: expected one file system for all of it, found {owners}; extract them apart")
    if len(folders) == 1:
        return folders[0]
    if owners == [""]:
        return posixpath.commonpath(folders)
    return f"{owners[0]}://" + posixpath.commonpath([folder.partition("://")[2] for folder in folders])


def _relative(path: str, root: str) -> str:
    return path[len(root) :].strip("/") or "."
