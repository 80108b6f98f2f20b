"""What a training runs on: versions, machine, command."""

import platform
import sys
from datetime import UTC, datetime
from typing import Any

import torch

from kpu.storage.places import redact
from kpu.util.versions import installed_versions

_PACKAGES = ("kpu", "torch", "timm", "numpy", "zarr", "ray")


def environment() -> dict[str, Any]:
    """Plain values, as of now."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [redact(argument) for argument in sys.argv[1:]],
        "host": platform.node(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **installed_versions(_PACKAGES),
    }
