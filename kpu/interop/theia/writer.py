"""Write one split of a dataset beside what exists, and move it there once it is complete."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

from kpu.errors import ConfigError, KpuError, LinkError, StorageError
from kpu.interop.theia.names import SAMPLES_PER_TAR, SPLITS, is_tar_of, parse_splits, tar_name
from kpu.shards.tar import TAR_BLOCK, TAR_END, tar_header
from kpu.storage.beneath import open_folder, read_file
from kpu.storage.leases import close_lock
from kpu.storage.local import sync_folder, write_error

_MOST_BYTES: Final = 2**24  # of splits.json


class Column:
    """Tars of 1,000 samples in a folder; each is synced to disk once it is full."""

    def __init__(self, folder: Path, dataset: str, split: str) -> None:
        with written(folder):
            folder.mkdir(parents=True)
        self._folder, self._dataset, self._split = folder, dataset, split
        self._file: IO[bytes] | None = None
        self.samples = 0

    def __enter__(self) -> "Column":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        elif self._file is not None:
            with suppress(OSError):  # a full disk refuses the rest of the buffer, too
                self._file.close()

    def add(self, name: str, data: bytes) -> None:
        """Append the file of the next sample.

        Raises:
            StorageError: it cannot be written.
        """
        with written(self._folder):
            if self.samples % SAMPLES_PER_TAR == 0:
                self._finish()
                number = self.samples // SAMPLES_PER_TAR
                self._file = (self._folder / tar_name(self._dataset, self._split, number)).open("xb")
            assert self._file is not None
            self._file.write(tar_header(name, len(data)))
            self._file.write(data)
            self._file.write(bytes(-len(data) % TAR_BLOCK))
        self.samples += 1

    def _finish(self) -> None:
        if self._file is not None:
            with written(self._folder), self._file as file:
                file.write(TAR_END)
                file.flush()
                os.fsync(file.fileno())
            self._file = None


@contextmanager
def beside(folder: Path, split: str) -> Iterator[Path]:
    """An empty, hidden folder in the dataset's, locked, gone at the end; what a killed export left there is cleared.

    Raises:
        ConfigError: another export is writing this split.
        StorageError: the dataset's folder cannot be written to.
    """
    place = folder / f".{split}.unfinished"
    with written(place):
        place.mkdir(parents=True, exist_ok=True)
        descriptor = open_folder(os.path.realpath(folder), place.name)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"split: {folder}: another export is writing {split!r}; wait for it") from None
        except OSError:  # a file system without locks
            pass
        with written(place):
            _clear(place, split, descriptor)
        yield place
    finally:
        with suppress(OSError, KpuError):
            _clear(place, split, descriptor)
            place.rmdir()
        close_lock(descriptor)


def _clear(place: Path, split: str, descriptor: int) -> None:
    """Remove what an export puts into its unfinished folder.

    Raises:
        ConfigError: there is something else, which is somebody's.
    """
    with os.scandir(descriptor) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        if is_folder:
            column = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
            try:
                for tar in os.listdir(column):  # noqa: PTH208
                    if is_tar_of(tar, split):
                        os.unlink(tar, dir_fd=column)
            finally:
                os.close(column)
            with suppress(OSError):
                os.rmdir(name, dir_fd=descriptor)
        elif name == SPLITS:
            os.unlink(name, dir_fd=descriptor)
    others = os.listdir(descriptor)
    if others:
        raise ConfigError(f"split: {place}: expected what an export left, found {others[0]!r}; move it elsewhere")


def read_splits(folder: Path) -> dict[str, Any]:
    """`splits.json` of a dataset: samples by split, empty if there is none.

    Raises:
        CorruptError: it is no JSON object.
        StorageError: it cannot be read.
    """
    try:
        raw = read_file(folder / SPLITS, _MOST_BYTES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"cannot read {folder / SPLITS}: {error.strerror}") from error
    return parse_splits(raw, str(folder / SPLITS))


def refuse_standing(folder: Path, split: str) -> None:
    """Check that the dataset has nothing of the split.

    Raises:
        ConfigError: it does.
    """
    if split in read_splits(folder):
        raise ConfigError(f"split: {folder / SPLITS} has {split!r} already, whole; choose another --split or --dataset")
    for tar in sorted(folder.glob("*/*.tar")):
        if is_tar_of(tar.name, split) and not tar.parent.name.startswith("."):
            raise ConfigError(
                f"split: {tar} exists, though {SPLITS} has no {split!r}: expected no tar of the split. If an export "
                "was killed while it moved its tars, remove them; or choose another --split or --dataset"
            )


def publish_split(place: Path, folder: Path, split: str, columns: Sequence[str], samples: int) -> None:
    """Move the tars of each column from `place` to the dataset, and last name the split in `splits.json`.

    Raises:
        ConfigError: a tar of the split exists there by now.
        StorageError: it cannot be written.
    """
    refuse_standing(folder, split)
    with written(folder):
        for column in columns:
            if (folder / column).is_symlink():
                raise LinkError(f"{folder}: expected a folder {column} of its own, found a symbolic link; remove it")
            (folder / column).mkdir(exist_ok=True)
            for tar in sorted((place / column).iterdir()):
                tar.rename(folder / column / tar.name)
            sync_folder(folder / column)
        with _locked(folder):
            splits = {**read_splits(folder), split: samples}
            with (place / SPLITS).open("w") as file:
                json.dump(splits, file, indent=4)
                file.flush()
                os.fsync(file.fileno())
            (place / SPLITS).replace(folder / SPLITS)
            sync_folder(folder)


@contextmanager
def written(place: Path) -> Iterator[None]:
    """Write at or below `place`.

    Raises:
        FullDiskError: no space is left.
        StorageError: the operating system refuses; naming the file, or `place`, and why.
    """
    try:
        yield
    except OSError as error:
        raise write_error(error, Path(error.filename or place)) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the dataset's folder, so that two exports do not write `splits.json` over each other's."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        close_lock(descriptor)
