"""What a training runs on: versions, machine, command."""

import platform
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("kpu", "torch", "timm", "numpy", "zarr", "ray")


def environment() -> dict[str, Any]:
    """Plain values, as of now."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "host": platform.node(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **_versions(_PACKAGES),
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
