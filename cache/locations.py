"""From a path or URL to the storage behind it."""

import os
from pathlib import Path

from cache.localstore import LocalStorage
from cache.storage import Storage


def open_storage(path: str | os.PathLike[str], *, create: bool = False) -> Storage:
    """Open the folder or fsspec URL `path`; with `create`, make it and probe that publishing works there.

    Raises:
        NotACacheError: there is no such folder, and `create` is off.
        StorageError: the location cannot be used; the message says why.
    """
    text = _plain_path(path)
    if "://" in text:
        from cache.objectstore import ObjectStorage  # fsspec loads slowly, and few need it

        remote = ObjectStorage(text)
        if create:
            remote.probe()
        return remote
    local = LocalStorage(text, create=create)
    if create:
        local.probe()
    return local


def stands(path: str | os.PathLike[str]) -> bool:
    """Whether there is anything to open at `path`: a folder, or an object store, which always can be."""
    text = _plain_path(path)
    return "://" in text or Path(text).is_dir()


def _plain_path(path: str | os.PathLike[str]) -> str:
    return os.fspath(path).removeprefix("file://")
