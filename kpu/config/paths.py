"""Paths in a configuration file: relative ones begin at the file's folder, wherever the command is called."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from kpu.errors import ConfigError

_PATTERN: Final = re.compile(r"[*?\[{]")


def anchor_paths(values: dict[str, Any], file: Path, keys: Sequence[str]) -> None:
    """Make the relative paths at `keys` of a file's values absolute, in place; of a list each, `*` is any name.

    Values that are no text are left for validation to refuse. Where the file is in the working directory nothing
    changes.

    Raises:
        ConfigError: a path leads nowhere from the file's folder, but somewhere from the working directory, where paths
            of older releases began.
    """
    folder = file.expanduser().absolute().parent
    if folder.resolve() == Path.cwd().resolve():
        return
    for key in keys:
        _anchor_at(values, key.split("."), key, folder, file)


def _anchor_at(values: Any, path: Sequence[str], key: str, folder: Path, file: Path) -> None:
    if not isinstance(values, dict):
        return
    name, *rest = path
    for each in list(values) if name == "*" else [name] if name in values else []:
        named = key.replace("*", str(each), 1) if name == "*" else key
        if rest:
            _anchor_at(values[each], rest, named, folder, file)
        else:
            values[each] = _anchored(values[each], named, folder, file)


def _anchored(value: Any, key: str, folder: Path, file: Path) -> Any:
    if isinstance(value, list):
        return [_anchored(each, key, folder, file) for each in value]
    if not isinstance(value, str):
        return value
    if key.endswith(".model"):
        return _anchored_model(value, key, folder, file)
    if value == "random" or not _is_relative(value):
        return value
    return _absolute(value, key, folder, file)


def _anchored_model(value: str, key: str, folder: Path, file: Path) -> str:
    """`torch:<file.py>:<factory>`, `hf:<folder>` and `timm:local-dir:<folder>` name places, other models do not."""
    kind, _, rest = value.partition(":")
    if kind == "torch":
        place, _, factory = rest.rpartition(":")
        if place.endswith(".py") and _is_relative(place):
            return f"torch:{_absolute(place, key, folder, file)}:{factory}"
    elif kind == "hf" and _is_relative(rest) and ((folder / rest).is_dir() or Path(rest).is_dir()):
        return f"hf:{_absolute(rest, key, folder, file)}"
    elif kind == "timm" and rest.startswith("local-dir:") and _is_relative(rest.removeprefix("local-dir:")):
        return f"timm:local-dir:{_absolute(rest.removeprefix('local-dir:'), key, folder, file)}"
    return value


def _is_relative(path: str) -> bool:
    return bool(path) and not path.startswith(("/", "~")) and "://" not in path


def _absolute(path: str, key: str, folder: Path, file: Path) -> str:
    here, there = os.path.normpath(folder / path), os.path.normpath(Path.cwd() / path)
    if not _exists(here) and _exists(there):
        raise ConfigError(
            f"{file}: {key}: expected something at {here}, for relative paths in a file begin at its folder, found "
            f"nothing there, but {there} exists; correct the path, or write it in full"
        )
    return here


def _exists(path: str) -> bool:
    """Whether there is something at a path or, for a pattern, at the folder before it."""
    found = _PATTERN.search(path)
    return os.path.lexists(path if found is None else os.path.dirname(path[: found.start()]))  # noqa: PTH120
