"""The place that `out` names: what is there before a run writes, and how to clean up after a failure."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kpu.errors import ConfigError, KpuError, StorageError
from kpu.format.plan import FORMAT, Plan
from kpu.records.plan import load_plan
from kpu.records.teachers import teacher_names
from kpu.storage import paths
from kpu.storage.created import Created
from kpu.storage.leases import MUTEX, live_runs, mutex
from kpu.storage.local import LocalStorage
from kpu.storage.open import open_storage
from pipeline.paths import is_url


def existing_plan(out: str) -> Plan | None:
    """The plan of the cache at `out` (an absolute path or a URL); None if one can be made.

    Nothing is written: a file system that is writable but has no hard links shows only when a cache is begun.

    Raises:
        ConfigError: a file is there, or a folder that holds something other than a cache.
        StorageError: the place cannot be written to.
        CacheError: the cache there is damaged, or of a format version that this release cannot read.
    """
    if is_url(out):
        return load_plan(open_storage(out))
    path = Path(out)
    if not os.path.lexists(path):
        _check_writable(_nearest(path), path)
        return None
    if not path.is_dir():
        found = f"a link to {path.readlink()}, which leads nowhere" if path.is_symlink() else "a file"
        raise ConfigError(
            f"out: {path}: expected a new path, an empty folder or a cache, found {found}; choose another `out`"
        )
    _refuse_foreign(path)
    _check_writable(path, path)
    return load_plan(open_storage(out))


@contextmanager
def cleanup_on_failure(out: str) -> Iterator[Created | None]:
    """Remove a new cache at `out`, a local path, if start-up fails before a teacher is published.

    Yields what notes the new files (see `open_storage`), None if all is to stay. Only files that the run made are
    removed, and folders that are empty then: the user may have put files there meanwhile.

    An interruption leaves what was made, for the same command to go on from there; so does another run at work there.
    In an object store what was begun stays, without harm.
    """
    path = Path(out)
    fresh = not is_url(out) and (not path.exists() or not any(path.iterdir()))
    created = Created() if fresh else None
    try:
        yield created
    except KpuError:
        if created and path.is_dir():
            with suppress(KpuError, OSError):
                _take_away(LocalStorage(path), created)
        raise


def _take_away(storage: LocalStorage, created: Created) -> None:
    place = os.path.realpath(storage.root)
    with mutex(storage):  # no run begins meanwhile
        if teacher_names(storage) or live_runs(storage):
            return
        created.remove(place, but=MUTEX)
    if not live_runs(storage):
        created.remove(place)  # the lock as well: while it is open, not every file system removes it


def _refuse_foreign(path: Path) -> None:
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise StorageError(f"out: {path}: cannot list it: {error.strerror}") from None
    for marker in (paths.PLAN, paths.ROOT):
        if marker in names and FORMAT in _text(path / marker):
            return
    begun = paths.TEMPORARY in names  # a run was interrupted before anything else stood
    others = sorted(names - {paths.TEMPORARY, paths.RUNS} if begun else names)
    if others:
        listed = ", ".join(map(repr, others[:3])) + (", ..." if len(others) > 3 else "")
        raise ConfigError(
            f"out: {path}: expected a new path, an empty folder or a cache, found a folder with {listed}; "
            "choose another `out`"
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _nearest(path: Path) -> Path:
    """The closest folder above a path that exists.

    Raises:
        StorageError: something above it is no folder.
    """
    folder = next(folder for folder in path.parents if os.path.lexists(folder))
    if not folder.is_dir():
        raise StorageError(f"out: {path}: {folder} is not a folder; choose another `out`")
    return folder


def _check_writable(folder: Path, path: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(
            f"out: {path}: expected a place that can be written to, found no permission to write in {folder}; give it, "
            "or choose another `out`"
        )
