"""Importing source files as the bytes that were read, and what lies beside them."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Final

from kpu.trust.list import LARGEST_SOURCE, read_regular
from kpu.util.digests import digest

_OWN_NAME: Final = "kpu_code_"


class _BytesLoader(importlib.abc.InspectLoader):
    """Runs exactly these bytes, never a stale compiled file, whether or not the file is on this machine."""

    def __init__(self, path: Path, source: bytes, *, package: bool = False) -> None:
        self._path, self._source, self._package = str(path), source, package

    def get_source(self, fullname: str) -> str:  # noqa: ARG002
        """The text, for tracebacks and tools."""
        return importlib.util.decode_source(self._source)

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002
        """The compiled bytes."""
        return self.source_to_code(self._source, self._path)

    def is_package(self, fullname: str) -> bool:  # noqa: ARG002
        """Whether it is an `__init__.py`."""
        return self._package


def _spec(name: str, file: Path, source: bytes, within: list[str] | None = None) -> importlib.machinery.ModuleSpec:
    loader = _BytesLoader(file, source, package=within is not None)
    spec = importlib.machinery.ModuleSpec(name, loader, origin=str(file), is_package=within is not None)
    spec.submodule_search_locations = within
    spec.has_location = True
    return spec


def execute(path: Path, source: bytes) -> ModuleType:
    """Run a file as a module of a name of its own. It stays in sys.modules: dataclasses, for one, look there."""
    name = f"{_OWN_NAME}{digest(str(path).encode(), source)}"
    spec = _spec(name, path, source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


class _Pinned(importlib.abc.MetaPathFinder):
    """Finds one module, as these bytes."""

    def __init__(self, name: str, file: Path, source: bytes) -> None:
        self._name, self._file, self._source = name, file, source

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:  # noqa: ARG002
        """The module's own specification; of others, None."""
        if fullname != self._name:
            return None
        within = [str(self._file.parent)] if self._file.name == "__init__.py" else None
        return _spec(fullname, self._file, self._source, within)


class _TrustedNeighbours(importlib.abc.MetaPathFinder):
    """Finds source files beside a file that the user did not name, and lets none run that he does not trust."""

    def __init__(self, folder: Path, require: Callable[[Path, bytes], None]) -> None:
        self._folder, self._require = folder, require
        self.found: list[str] = []

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:  # noqa: ARG002
        """The file's bytes where they are trusted; None if there is no such file.

        Raises:
            TrustError: the file is not trusted.
        """
        top, *rest = fullname.split(".")
        if rest and top not in self.found:  # a package of the libraries
            return None
        base = self._folder.joinpath(top, *rest)
        for file, within in ((base / "__init__.py", []), (base.with_name(f"{base.name}.py"), None)):
            try:
                source = read_regular(file, LARGEST_SOURCE)
            except OSError:
                continue
            self._require(file, source)
            self.found.append(fullname)
            # An empty path leaves modules of the package to this finder.
            return _spec(fullname, file, source, within)
        return None


@contextmanager
def pinned(name: str, file: Path, source: bytes) -> Iterator[None]:
    finder = _Pinned(name, file, source)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@contextmanager
def trusted_beside(folder: Path, require: Callable[[Path, bytes], None]) -> Iterator[Callable[[], list[Path]]]:
    """As `beside`, for code that the user did not name: each neighbour, file and source, must pass `require`."""
    finder = _TrustedNeighbours(folder, require)
    sys.meta_path.append(finder)
    try:
        yield list
    finally:
        sys.meta_path.remove(finder)
        for name in finder.found:
            sys.modules.pop(name, None)


@contextmanager
def beside(folder: Path) -> Iterator[Callable[[], list[Path]]]:
    """Let a file import its neighbours, without letting them shadow anything or stay in another's way.

    The folder is the last on the path, and only here; neighbours that were imported leave sys.modules again, so that a
    file in another folder with a neighbour of the same name gets its own. Yields what lists their source files.
    """
    before = {name.partition(".")[0] for name in sys.modules}

    def imported() -> list[str]:
        new = {name for name in sys.modules if name.partition(".")[0] not in before}
        inside = {name for name in new if "." not in name and _is_in(sys.modules[name], folder)}
        return [name for name in new if name.partition(".")[0] in inside]

    def files() -> list[Path]:
        found = [getattr(sys.modules[name], "__file__", None) for name in imported()]
        return [Path(file) for file in found if file is not None and file.endswith(".py")]

    if str(folder) in sys.path:
        yield files
        return
    sys.path.append(str(folder))
    importlib.invalidate_caches()
    try:
        yield files
    finally:
        sys.path.remove(str(folder))
        for name in imported():
            del sys.modules[name]


def _is_in(module: ModuleType, folder: Path) -> bool:
    """Whether a module, or package, is a file, or folder, of `folder`."""
    file = getattr(module, "__file__", None)
    places = [*getattr(module, "__path__", ())] or ([file] if file is not None else [])
    return not module.__name__.startswith(_OWN_NAME) and any(Path(place).parent == folder for place in places)
