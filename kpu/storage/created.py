"""What a run made at a place: so that a failed start takes away this, and nothing else."""

import os
import threading
from contextlib import suppress
from pathlib import Path

from kpu.errors import StorageError
from kpu.storage.beneath import open_folder


class Created:
    """Files and folders that a storage made, by key; `above` are the folders it made to get there, outermost first.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[str, None] = {}
        self._folders: list[str] = []
        self.above: list[Path] = []

    def __bool__(self) -> bool:
        return bool(self._files or self._folders or self.above)

    def file(self, key: str) -> None:
        """A file was made under a name that was free."""
        with self._lock:
            self._files[key] = None

    def folder(self, key: str) -> None:
        """A folder was made."""
        with self._lock:
            self._folders.append(key)

    def moved(self, key: str, target: str) -> None:
        """A file was moved; it is still ours, if it was."""
        with self._lock:
            if key in self._files:
                del self._files[key]
                self._files[target] = None

    def remove(self, root: str, *, but: str = "") -> None:
        """Delete these files below `root`, `but` one, and of the folders those that are empty then.

        What fails to go stays.
        """
        with self._lock:
            for key in self._files:
                if key == but:
                    continue
                _remove(root, key, is_folder=False)
            for key in reversed(self._folders):
                _remove(root, key, is_folder=True)
            for folder in reversed(self.above):
                with suppress(OSError):
                    folder.rmdir()


def _remove(root: str, key: str, *, is_folder: bool) -> None:
    folder, _, name = key.rpartition("/")
    with suppress(OSError, StorageError):
        descriptor = open_folder(root, folder)
        try:
            if is_folder:
                os.rmdir(name, dir_fd=descriptor)
            else:
                os.unlink(name, dir_fd=descriptor)
        finally:
            os.close(descriptor)
