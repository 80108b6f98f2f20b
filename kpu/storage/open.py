"""From a path or URL to the storage behind it."""

import os
import secrets
from pathlib import Path

from kpu.errors import StorageError
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.storage.created import Created
from kpu.storage.leases import lease
from kpu.storage.local import LocalStorage
from kpu.storage.places import redact, refuse_password


def open_storage(path: str | os.PathLike[str], *, create: bool = False, created: Created | None = None) -> Storage:
    """Open the folder or fsspec URL `path`; with `create`, make it and probe that publishing works there.

    In a folder, what is made is noted in `created`, if that is given.

    Raises:
        NotACacheError: there is no such folder, and `create` is off.
        ConfigError: the URL has a password in it.
        StorageError: the location cannot be used; the message says why.
    """
    text = _plain_path(path)
    storage: Storage
    if "://" in text:
        from kpu.storage.object_store import ObjectStorage  # fsspec loads slowly, and few need it

        refuse_password(text, "cache")
        storage = ObjectStorage(text)
    else:
        storage = LocalStorage(text, create=create, created=created)
    if create:
        _probe(storage, text)
    return storage


def location_exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is anything to open at `path`: a folder, or an object store, which always can be."""
    text = _plain_path(path)
    return "://" in text or Path(text).is_dir()


def _probe(storage: Storage, location: str) -> None:
    """Publish twice under one name below `.tmp`, and see that the second loses.

    The object is read back: where a store's answer to the first was lost, its client tries again and is told
    that the name is taken, by ourselves.

    Raises:
        StorageError: the location is not writable, or overwrites existing objects.
    """
    run = f"probe-{secrets.token_hex(8)}"
    folder = f"{paths.TEMPORARY}/{run}"
    first, second = (f"probe {secrets.token_hex(16)}".encode() for _ in range(2))
    try:
        with lease(storage, run):
            storage.publish(f"{folder}/probe", first, run=run)
            lost = not storage.publish(f"{folder}/probe", second, run=run)
            kept = storage.read(f"{folder}/probe", limit=len(first)) == first
    finally:
        storage.remove(folder)  # with the lease closed: an open file cannot be removed from every file system
    if not (lost and kept):
        raise StorageError(
            f"{redact(location)}: expected a place that refuses to overwrite when asked (hard links, or If-None-Match: "
            "* in an object store), found one that overwrites: a cache there could lose or mix data; use another one"
        )


def _plain_path(path: str | os.PathLike[str]) -> str:
    return os.fspath(path).removeprefix("file://")
