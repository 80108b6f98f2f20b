"""The place of a run, and what is refused there before torch is loaded."""

import os
from pathlib import Path
from typing import Final

from kpu.errors import ConfigError
from kpu.storage.found import describe_place

CONFIG: Final = "config.yaml"
SOURCES, STATISTICS, HEADS = "sources.json", "statistics.safetensors", "heads.safetensors"
SOURCE_FILES: Final = (STATISTICS, HEADS, SOURCES)


def check_place(path: Path) -> None:
    """Check that a run can begin at `path`.

    Raises:
        ConfigError: there is a run already, or there are other files.
    """
    if (path / CONFIG).exists():
        raise ConfigError(f"out: {path}: a run exists there; continue it with --resume, or choose another folder")
    if path.exists() and (not path.is_dir() or any(not _left_over(file) for file in path.iterdir())):
        raise ConfigError(
            f"out: {path}: expected a new path or an empty folder, found {describe_place(path)}; choose another"
        )


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


def _left_over(file: Path) -> bool:
    """Whether a file is one that a run which never began may have left."""
    if file.name == "checkpoints":
        return file.is_dir() and not any(file.iterdir())
    return file.name in SOURCE_FILES or file.name.startswith(tuple(f".{name}." for name in (*SOURCE_FILES, CONFIG)))
