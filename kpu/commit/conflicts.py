"""Resolve conflicts on exclusive publish.

A marker (the plan, a teacher's `zarr.json`, a commit record) seals the files that it describes. A file without its
marker was left by a run that died, or is being written by another driver. There are no locks, so a driver may
quarantine a file that another driver's marker describes a moment later; each driver restores such files once the marker
exists.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from kpu.errors import CorruptError, MismatchError, StorageError
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.util.digests import digest

ATTEMPTS: Final = 8  # each failed attempt means that another driver changed the key between two of our calls


@contextmanager
def publishing(
    storage: Storage, marker: str, run: str, sealed: Callable[[], Mapping[str, str]]
) -> Iterator[Callable[[str, bytes], str]]:
    """Yield a `publish(key, data)` function for the files that `marker` will seal; see `publish_or_quarantine`.

    If `marker` exists on exit, whoever published it, restore the sealed files that were quarantined meanwhile. `sealed`
    reads their digests, by key, from the marker.

    Raises:
        CorruptError: a sealed file is missing or has other content, and is not in quarantine either.
    """
    try:
        yield lambda key, data: publish_or_quarantine(storage, key, data, marker=marker, run=run)
    finally:
        if any(True for _ in storage.names(paths.QUARANTINE)) and storage.size(marker) is not None:
            _restore_files(storage, sealed(), marker, run)


def publish_or_quarantine(storage: Storage, key: str, data: bytes, *, marker: str, run: str) -> str:
    """Publish `data`, quarantining conflicts until `marker` exists; return its digest.

    Raises:
        MismatchError: `marker` exists and `key` holds other bytes.
    """
    for _ in range(ATTEMPTS):
        if storage.publish(key, data, run=run):
            return digest(data)
        try:
            if storage.read(key) == data:
                return digest(data)
        except FileNotFoundError:
            continue
        if storage.size(marker) is None:
            storage.quarantine(key, run=run)
        if storage.size(marker) is not None:  # or it was published during the move, and describes what was moved
            raise MismatchError(
                f"{key}: conflicts with {marker}, which another run has just published with another configuration or "
                "other data; use the same configuration, or another `out`"
            )
    raise contested(key)


def _restore_files(storage: Storage, sealed: Mapping[str, str], marker: str, run: str) -> None:
    for key, expected in sealed.items():
        for _ in range(ATTEMPTS):
            existing = _read(storage, key)
            if existing is not None and digest(existing) == expected:
                break
            data = _find_quarantined(storage, key, expected)
            if data is None:
                raise CorruptError(key, f"is not the file that {marker} describes, which is not in quarantine either")
            storage.quarantine(key, run=run)
            storage.publish(key, data, run=run)
        else:
            raise contested(key)


def _read(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.read(key)
    except FileNotFoundError:
        return None


def _find_quarantined(storage: Storage, key: str, expected: str) -> bytes | None:
    """The file with this digest that a run quarantined from `key`; the names of such files may have a suffix."""
    folder, _, name = f"/{key}".rpartition("/")
    for run in storage.names(paths.QUARANTINE):
        place = f"{paths.QUARANTINE}/{run}{folder}"
        for found in storage.names(place):
            if found == name or found.startswith(f"{name}."):
                data = _read(storage, f"{place}/{found}")
                if data is not None and digest(data) == expected:
                    return data
    return None


def contested(key: str) -> StorageError:
    return StorageError(
        f"{key}: another run keeps replacing this object; stop all runs on this cache but one, and run it again"
    )
