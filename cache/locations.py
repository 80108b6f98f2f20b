"""From a path or URL to the storage behind it."""

import os
import secrets
from pathlib import Path

from cache import layout
from cache.errors import StorageError
from cache.leases import lease
from cache.localstore import LocalStorage
from cache.storage import Storage


def open_storage(path: str | os.PathLike[str], *, create: bool = False) -> Storage:
    """Open the folder or fsspec URL `path`; with `create`, make it and probe that publishing works there.

    Raises:
        NotACacheError: there is no such folder, and `create` is off.
        StorageError: the location cannot be used; the message says why.
    """
    text = _plain_path(path)
    storage: Storage
    if "://" in text:
        from cache.objectstore import ObjectStorage  # fsspec loads slowly, and few need it

        storage = ObjectStorage(text)
    else:
        storage = LocalStorage(text, create=create)
    if create:
        _probe(storage, text)
    return storage


def stands(path: str | os.PathLike[str]) -> bool:
    """Whether there is anything to open at `path`: a folder, or an object store, which always can be."""
    text = _plain_path(path)
    return "://" in text or Path(text).is_dir()


def _probe(storage: Storage, location: str) -> None:
    """Publish twice under one name below `.tmp`, and see that the second loses.

    Raises:
        StorageError: the location is not writable, or overwrites what stands.
    """
    run = f"probe-{secrets.token_hex(8)}"
    folder = f"{layout.TEMPORARY}/{run}"
    with lease(storage, run):
        try:
            first, second = (storage.publish(f"{folder}/probe", b"probe", run=run) for _ in range(2))
        finally:
            storage.remove(folder)
    if not first or second:
        raise StorageError(
            f"{location}: expected a place that refuses to overwrite when asked (hard links, or If-None-Match: * in an "
            "object store), found one that overwrites: a cache there could lose or mix data; use another one"
        )


def _plain_path(path: str | os.PathLike[str]) -> str:
    return os.fspath(path).removeprefix("file://")
