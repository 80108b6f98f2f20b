"""Making every path of a configuration absolute, so that it means the same in a worker with another directory."""

import os
from pathlib import Path
from typing import Any

from kpu.format.teacher import LOCAL_DIR
from pipeline.config import ExtractConfig
from pipeline.sections import TeacherConfig


def is_url(path: str) -> bool:
    """Whether fsspec, not the local file system, owns this path."""
    return "://" in path


def absolute(path: str) -> str:
    """An absolute form of a local path, `file://` URL or glob, without resolving links; other URLs stay as they are."""
    path = path.removeprefix("file://")  # all that fsspec takes away: percent signs mean themselves
    return path if is_url(path) else os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111


def resolve_paths(config: ExtractConfig) -> ExtractConfig:
    """The same configuration with absolute paths."""
    source = config.data.source
    sources = absolute(source) if isinstance(source, str) else tuple(map(absolute, source))
    changes: dict[str, Any] = {
        "data": config.data.model_copy(update={"source": sources}),
        "out": absolute(config.out),
        "teachers": {name: _resolve_teacher(teacher) for name, teacher in config.teachers.items()},
    }
    if config.calibration_from is not None:
        changes["calibration_from"] = absolute(config.calibration_from)
    return config.model_copy(update=changes)


def _resolve_teacher(config: TeacherConfig) -> TeacherConfig:
    changes: dict[str, Any] = {}
    if config.weights is not None and config.weights != "random":
        changes["weights"] = absolute(config.weights)
    kind, _, rest = config.model.partition(":")
    if kind == "torch":
        place, _, factory = rest.rpartition(":")
        if place.endswith(".py"):
            changes["model"] = f"torch:{absolute(place)}:{factory}"
    elif kind == "hf" and Path(rest).expanduser().is_dir():
        changes["model"] = f"hf:{absolute(rest)}"
    elif kind == "timm" and rest.startswith(LOCAL_DIR):
        changes["model"] = f"timm:{LOCAL_DIR}{absolute(rest.removeprefix(LOCAL_DIR))}"
    return config.model_copy(update=changes)
