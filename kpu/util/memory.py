"""How much memory this machine, or the container around this process, can still give."""

from pathlib import Path
from typing import Final

_MEMORY: Final = Path("/proc/meminfo")
_GROUP: Final = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that can be had without swapping, caches of files included; None if the system does not say.

    A container's limit counts where it is lower.
    """
    found = [_available(_MEMORY), _left(_GROUP / "memory.max", _GROUP / "memory.current")]
    return min((value for value in found if value is not None), default=None)


def _available(file: Path) -> int | None:
    """What Linux can give without swapping, caches of files included."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left(limit: Path, used: Path) -> int | None:
    """What a control group (version 2) may still take; None without a limit."""
    try:
        return max(0, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no group, or the limit "max"
        return None
