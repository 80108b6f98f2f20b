"""The place of a run, and what is refused there before torch is loaded."""

import os
import secrets
from pathlib import Path
from typing import Final

from kpu.errors import ConfigError, StorageError
from kpu.storage.found import describe_place

CONFIG: Final = "config.yaml"
SOURCES, STATISTICS, HEADS = "sources.json", "statistics.safetensors", "heads.safetensors"
FOLDERS: Final = ("checkpoints", "best", "tensorboard")
SOURCE_FILES: Final = (STATISTICS, HEADS, SOURCES)


def check_place(path: Path) -> None:
    """Check that a run can begin at `path`.

    Raises:
        ConfigError: there is a run already, or there are other files.
        StorageError: nothing can be written there.
    """
    if (path / CONFIG).exists():
        raise ConfigError(f"out: {path}: a run exists there; continue it with --resume, or choose another folder")
    if path.exists() and (not path.is_dir() or any(not _left_over(file) for file in path.iterdir())):
        raise ConfigError(
            f"out: {path}: expected a new path or an empty folder, found {describe_place(path)}; choose another"
        )
    _try_to_write(path)


def require_run(path: Path) -> None:
    """Check that there is a run at `path`.

    Raises:
        ConfigError: there is none.
    """
    if not (path / CONFIG).is_file():
        raise ConfigError(f"{path}: expected a run of kpu-train, found {describe_place(path)}; check the path")


def require_nothing(path: Path) -> None:
    """Check that nothing exists at `path`.

    Raises:
        ConfigError: something does.
    """
    if os.path.lexists(path):
        raise ConfigError(f"out: {path}: expected a path where nothing exists yet, found something; choose another")


def _try_to_write(path: Path) -> None:
    """Make the first folder that is missing on the way to `path`, or a folder in it, and remove it again."""
    missing = [each for each in (path, *path.parents) if not os.path.lexists(each)]
    probe = missing[-1] if missing else path / f".probe-{secrets.token_hex(8)}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise StorageError(
            f"out: {path}: expected a place that can be written to, found {probe.parent} ({error.strerror}); choose "
            "another"
        ) from None


def _left_over(file: Path) -> bool:
    """Whether a file is one that a run which never began may have left."""
    if file.name == "checkpoints":
        return file.is_dir() and not any(file.iterdir())
    return file.name in SOURCE_FILES or file.name.startswith(tuple(f".{name}." for name in (*SOURCE_FILES, CONFIG)))
