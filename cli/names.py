"""Whether the packages that KPU imports are its own: their plain names belong to other distributions as well."""

from importlib.machinery import PathFinder
from pathlib import Path
from typing import Final

from cache.errors import ConfigError

PACKAGES: Final = ("cache", "pipeline", "trainer", "cli")
_MARK: Final = '__distribution__ = "kpu"'


def check_names() -> None:
    """Check that each package lies beside this one and is KPU's, without importing it.

    Raises:
        ConfigError: another distribution, or a file of the user's, has taken a name.
    """
    own = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        spec = PathFinder.find_spec(name)
        origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if origin == own / name / "__init__.py" and _MARK in origin.read_text(encoding="utf-8", errors="replace"):
            continue
        raise ConfigError(
            f"import name {name!r}: expected KPU's package in {own / name}, found "
            f"{'nothing' if origin is None else 'another one'}{'' if origin is None else f' ({origin})'}: another "
            "distribution or a file of yours has taken its name; install KPU in an environment of its own, as with "
            "`pipx install` or `uv tool install`, or reinstall it"
        )
