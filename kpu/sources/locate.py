"""From `data.source` (a path, URL, glob, braces, or a list of them) to the files and folders that it names."""

import glob
import os
import posixpath
import stat
from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from kpu.errors import SourceError
from kpu.records.leftout import LeftOut, Tally
from kpu.sources.braces import expand_braces
from kpu.sources.files import Files, file_system, is_local, to_name, to_text
from kpu.sources.formats import IMAGES, MACOS, Kind, extension, is_archive, kind_by_name
from kpu.storage.places import refuse_password
from kpu.util.faults import is_fault

_MAGIC: Final = "*?["


class LocatedPath(NamedTuple):
    """One thing to list, relative to the root (`.` is the root itself)."""

    path: str
    is_folder: bool


class Located(NamedTuple):
    """What a source is made of, in the order given; globs are sorted. `left_out` lay beside it."""

    kind: Kind
    files: Files
    entries: tuple[LocatedPath, ...]
    left_out: tuple[LeftOut, ...] = ()


class _Found(NamedTuple):
    path: str
    kind: Kind | None
    is_folder: bool


def locate(source: str | Sequence[str]) -> Located:
    """Find what `source` names, without listing image folders.

    Raises:
        SourceError: something does not exist, a pattern matches nothing, or different kinds are mixed.
    """
    patterns = [source] if isinstance(source, str) else list(source)
    if not patterns:
        raise SourceError("data.source: expected a path, a pattern or a list of them, found an empty list")
    beside = Tally()
    found = [item for pattern in patterns for item in _expand(pattern, beside)]
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
    entries = tuple(LocatedPath(_relative(item.path, root), item.is_folder) for item in found)
    return Located(next(iter(kinds)), Files(root), entries, beside.result())


def _expand(pattern: str, beside: Tally) -> list[_Found]:
    """What a pattern names; `beside` counts what it matches that is no source, and what lies beside shards."""
    refuse_password(pattern, "data.source")
    if is_local(pattern):
        pattern = os.path.abspath(os.path.expanduser(to_name(pattern)))  # noqa: PTH100, PTH111 - links stay unresolved
        if os.path.lexists(pattern):
            return _look(pattern, beside, literal=True)
    try:
        paths = expand_braces(pattern)
    except ValueError as error:
        raise SourceError(f"data.source: {pattern}: cannot expand its braces: {error}") from None
    found = []
    for path in paths:
        if not any(character in path for character in _MAGIC):
            found += _look(path, beside, literal=True)
            continue
        matches = _glob(path)
        if not matches:
            raise SourceError(f"data.source: no file matches {path}")
        for item in [item for match in matches for item in _look(match, beside, literal=False)]:
            if item.kind is not None:
                found.append(item)
            else:  # beside what it was meant for, a pattern often matches a README or an index
                beside.add_file(item.path)
    if not found:
        raise SourceError(f"data.source: {pattern} matches no folder, .tar, .parquet or image file")
    return found


def _glob(pattern: str) -> list[str]:
    if is_local(pattern):
        return sorted(glob.glob(pattern, recursive=True), key=to_text)  # noqa: PTH207 - patterns are absolute
    system, path = file_system(pattern)
    return sorted(system.unstrip_protocol(match) for match in _ask(pattern, lambda: system.glob(path)))


def _look(path: str, beside: Tally, *, literal: bool) -> list[_Found]:
    """What a path is: one file or image folder, or the shards in a folder of shards."""
    kind = kind_by_name(path)
    if is_local(path):
        try:
            is_folder = stat.S_ISDIR(Path(path).stat().st_mode)
        except OSError as error:
            raise SourceError(f"data.source: {path}: {_absence(path, error)}") from None
        names = _local_names(path) if is_folder else []
        path = to_text(path)
    else:
        system, inner = file_system(path)
        path = system.unstrip_protocol(inner)
        # A shard that is not there shows when it is opened: asking for each of 100,000 of them first would take hours.
        is_folder = kind is None and bool(_ask(path, lambda: system.isdir(inner)))
        if kind is None and not is_folder and literal:
            raise SourceError(f"data.source: {path}: no such folder")
        names = _remote_names(path, system, inner) if is_folder else []
    if not is_folder:
        if literal and extension(path) == "arrow":
            raise SourceError(_convert(path, f"Dataset.from_file({path!r})"))
        return [_Found(path, kind, is_folder=False)]
    return _in_folder(path.rstrip("/") or "/", names, beside)


def _in_folder(path: str, names: Sequence[tuple[str, bool]], beside: Tally) -> list[_Found]:
    """A folder of images, or the shards in it; `names` each with whether it is a folder."""
    visible = [(name, folder) for name, folder in names if not name.startswith(".") and name != MACOS]
    kinds = {name: kind_by_name(name) for name, folder in visible if not folder}
    shards = sorted(name for name, kind in kinds.items() if kind in ("tar", "parquet"))
    pictures = sorted(name for name, kind in kinds.items() if kind == "folder")
    if not shards and not pictures and _is_saved_dataset(kinds):
        split = "['train']" if "dataset_dict.json" in kinds else ""
        raise SourceError(_convert(path, f"load_from_disk({path!r}){split}"))
    folders = sorted(name for name, folder in visible if folder)
    _refuse_mixed(path, [name for name in shards if not is_archive(name)], pictures, folders)
    if not shards or pictures or folders:
        return [_Found(path, "folder", is_folder=True)]
    for name, folder in names:
        if folder or kinds.get(name) is None:
            beside.add_file(f"{path}/{name}")
    return [_Found(f"{path}/{name}", kinds[name], is_folder=False) for name in shards]


def _refuse_mixed(path: str, shards: Sequence[str], pictures: Sequence[str], folders: Sequence[str]) -> None:
    """Refuse shards beside images, or several shards beside folders: which of them is the data?

    One shard beside folders is most often the download that they were unpacked from.
    """
    nameless = "" in folders  # of keys with `//`, which listing the folder refuses
    if nameless or not shards or not (pictures or (folders and len(shards) > 1)):
        return
    if pictures:
        others, pattern = f"{pictures[0]} ({len(pictures):,} images)", f"'{path}/*.{extension(pictures[0])}'"
    else:
        others, pattern = f"the folder {folders[0]} ({len(folders):,} folders)", f"'{path}/{folders[0]}'"
    raise SourceError(
        f"data.source: {path}: expected one kind of source, found {shards[0]} ({len(shards):,} shards) beside "
        f"{others}; name those that are meant, such as '{path}/*.{extension(shards[0])}' or {pattern}, or move the "
        "others away"
    )


def _is_saved_dataset(names: Container[str]) -> bool:
    return "dataset_dict.json" in names or ("dataset_info.json" in names and "state.json" in names)


def _convert(path: str, loaded: str) -> str:
    """What to do with what the library datasets wrote; `loaded` is the expression that loads it."""
    return (
        f"data.source: {path}: holds Arrow files, as save_to_disk of the library datasets writes them; they are not "
        f'read: convert them once and give the Parquet file, python -c "from datasets import *; {loaded}.to_parquet('
        "'train.parquet')\""
    )


def _local_names(path: str) -> list[tuple[str, bool]]:
    """Names in a folder, each with whether it is a folder."""
    try:
        with os.scandir(path) as entries:
            return [(to_text(entry.name), entry.is_dir()) for entry in entries]
    except OSError as error:
        raise SourceError(f"data.source: {path}: cannot list it: {error.strerror}") from None


def _remote_names(path: str, system: Any, inner: str) -> list[tuple[str, bool]]:
    listing: list[Any] = _ask(path, lambda: system.ls(inner, detail=True))
    own = inner.rstrip("/")  # object stores list a folder's own marker object among its content
    names = [(item["name"].rstrip("/"), item["type"] == "directory") for item in listing]
    # A folder of the same name holds keys with `//`: nameless here, and refused when it is listed.
    return [
        ("" if name == own else posixpath.basename(name), folder) for name, folder in names if name != own or folder
    ]


def _ask(path: str, question: Callable[[], Any]) -> Any:
    """The answer of a remote file system. Clients raise errors of their own: no credentials, no network, no bucket."""
    try:
        return question()
    except Exception as error:
        failure = SourceError(f"data.source: {path}: cannot be listed: {type(error).__name__}: {error}")
        if is_fault(error):
            failure.exit_code = 1
        raise failure from error


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
