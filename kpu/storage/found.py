"""What is at a path, in words: for messages that expected something else there."""

import os
from pathlib import Path
from typing import Final

from kpu.storage import paths

_LISTED: Final = 3
_KNOWN: Final = (
    ((paths.PLAN,), "a cache; `kpu-cache info` shows what it holds"),
    (
        ("config.yaml", "sources.json"),
        "a run of kpu-train; measure it with `kpu-train eval`, export its student with `kpu-train export`",
    ),
    (("config.json", "student.safetensors"), "an exported student; load it with `kpu.load_student`"),
)


def describe_place(path: str | os.PathLike[str]) -> str:
    """What is at a local path or URL, such as `nothing`, `a file`, or a run and what it is good for."""
    if "://" in str(path):
        return f"no {paths.PLAN}"
    place = Path(path)
    if not os.path.lexists(place):
        return "nothing"
    if not place.is_dir():
        return "a file"
    for markers, name in _KNOWN:
        if all((place / marker).is_file() for marker in markers):
            return name
    try:
        names = sorted(entry.name for entry in place.iterdir())
    except OSError as error:
        return f"a folder that cannot be listed ({error.strerror})"
    if not names:
        return "an empty folder"
    listed = ", ".join(map(repr, names[:_LISTED])) + (", ..." if len(names) > _LISTED else "")
    return f"a folder with {listed}"
