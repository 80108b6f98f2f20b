"""Find `pipeline`, `trainer` and `cli` beside this package, whatever else has these plain names.

A folder on PYTHONPATH, the directory of a script or a submitted Ray job may hold a `trainer/` or a `cli.py` as well; it
would come first on the import path. Only the standard library is needed here.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Final

ROOT: Final = Path(__file__).absolute().parents[1]
PACKAGES: Final = ("pipeline", "trainer", "cli")
_MARK: Final = '__distribution__ = "kpu"'


class _OwnPackages(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(ROOT)], target) if path is None and name in PACKAGES else None


def find_own_packages_first() -> None:
    """Import the packages beside this one from now on; calling it again changes nothing.

    Raises:
        ImportError: a package of the same name has been imported already.
    """
    if any(isinstance(finder, _OwnPackages) for finder in sys.meta_path):
        return
    for name in PACKAGES:
        if name in sys.modules and not _is_own(getattr(sys.modules[name], "__file__", None), name):
            raise ImportError(
                f"import name {name!r}: expected KPU's package in {ROOT / name}, found another one, imported before "
                f"({getattr(sys.modules[name], '__file__', None)}); use KPU in a process of its own"
            )
    sys.meta_path.insert(0, _OwnPackages())


class _InstalledFirst(MetaPathFinder):
    """Finds modules where they could be found when it was made, whatever has been put before these places since."""

    def __init__(self) -> None:
        self._places = list(sys.path)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, self._places, target) if path is None else None


def prepare_ray_worker() -> None:
    """What every Ray worker does at its start: find KPU's packages first, and the driver's directory last.

    With its first task a worker puts the directory that the driver was started in before all others on its import path,
    where a stray `torch.py` would replace the package. A command of an installation does not look there at all.
    """
    find_own_packages_first()
    sys.meta_path.insert(sys.meta_path.index(PathFinder), _InstalledFirst())


def _is_own(file: str | None, name: str) -> bool:
    return file is not None and Path(file).absolute() == ROOT / name / "__init__.py"


def overwritten_packages() -> list[str]:
    """Packages beside this one that are not KPU's: another distribution was installed over them, or removed them."""
    return [name for name in PACKAGES if _MARK not in _text(ROOT / name / "__init__.py")]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
