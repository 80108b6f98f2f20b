"""Running the Python that a `torch:<file.py or module>:<factory>` model names, once it may run.

What runs is what was read: the bytes whose digest was looked up are those that are compiled, never a compiled file
beside them, nor what the file has become since.
"""

import hashlib
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Final

from kpu.errors import MismatchError, TrustError
from kpu.trust.imports import beside, execute, pinned, trusted_beside
from kpu.trust.list import LARGEST_SOURCE, Trust, how_to_trust, load_trust, read_regular
from kpu.util.digests import digest

_KIND: Final = "torch:"


@dataclass(frozen=True)
class Code:
    """The code of a model. `source` is the content of `file`, both None for a module that has no source file."""

    place: str
    factory: str
    file: Path | None
    source: bytes | None

    @property
    def is_file(self) -> bool:
        """Whether a file is named, and not a module."""
        return self.place.endswith(".py")

    @property
    def key(self) -> str | None:
        """What the user's list goes by: the SHA-256 digest of the source."""
        return None if self.source is None else sha256(self.source)

    @property
    def name(self) -> str:
        """What was named: a module, or this very content of this very file."""
        return f"{self.key} {self.file.absolute()}" if self.is_file and self.file else f"module {self.place}"

    @property
    def digest(self) -> str | None:
        """What a teacher's record says of the source."""
        return None if self.source is None else digest(self.source)


def sha256(source: bytes) -> str:
    """As `sha256sum` prints it."""
    return hashlib.sha256(source).hexdigest()


def split_model(model: str) -> tuple[str, str]:
    """The file or module, and the factory, of `torch:<file.py or module>:<factory>`."""
    place, _, factory = model.removeprefix(_KIND).rpartition(":")
    return place, factory


def read_code(model: str) -> Code | None:
    """What a model names, read but not run; None if it is no `torch:` model.

    Raises:
        OSError: there is no such file, or it is no regular file.
    """
    if not model.startswith(_KIND):
        return None
    place, factory = split_model(model)
    file = Path(place) if place.endswith(".py") else find_module(place)
    return Code(place, factory, file, None if file is None else read_regular(file, LARGEST_SOURCE))


def naming(trust: Trust, *codes: Code | None) -> Trust:
    """`trust`, and code that the user named."""
    found = [code for code in codes if code is not None]
    listed = frozenset(code.key for code in found if code.key is not None)
    return replace(trust, listed=trust.listed | listed, named=trust.named | {code.name for code in found})


def naming_models(trust: Trust, *models: str | None) -> Trust:
    """`trust`, and the code of models that the user named; what cannot be read is left to whoever loads it."""
    codes = []
    for model in models:
        with suppress(OSError):
            codes.append(None if model is None else read_code(model))
    return naming(trust, *codes)


def places_of(*models: str) -> dict[str, str]:
    """Files of the code of models by its SHA-256 digest, as `remember` takes them, of what can be read."""
    found = {}
    for model in models:
        with suppress(OSError):
            code = read_code(model)
            if code is not None and code.key is not None and code.file is not None:
                found[code.key] = str(code.file.absolute())
    return found


def find_module(name: str) -> Path | None:
    """The source file of an importable module, found without running it or a package that it lies in."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None:
        return None
    found = None if spec.origin is None else Path(spec.origin)
    places = [Path(each) for each in spec.submodule_search_locations or ()]
    for part in rest:  # importlib would import the packages that these lie in
        found = next((file for place in places for file in _sources(place / part) if file.is_file()), None)
        if found is None:
            places = [place / part for place in places if (place / part).is_dir()]
        else:
            places = [found.parent] if found.name == "__init__.py" else []
    return found if found is not None and found.suffix == ".py" else None


def _sources(place: Path) -> tuple[Path, Path]:
    return place / "__init__.py", place.with_name(f"{place.name}.py")


class CodeLoader:
    """Reads code, once for each model, and runs what `trust` allows; by default what the user's list has.

    `recorded` are digests (`Code.digest`) by model, of the code that is wanted. `ran` are the places, by SHA-256
    digest, of what was run because the user named it, neighbours included.
    """

    def __init__(self, trust: Trust | None = None, recorded: Mapping[str, str] | None = None) -> None:
        self.trust = load_trust() if trust is None else trust
        self.recorded = dict(recorded or {})
        self.ran: dict[str, str] = {}
        self._read: dict[str, Code | None] = {}

    def read(self, model: str) -> Code | None:
        """`read_code`, of what was read at first."""
        if model not in self._read:
            self._read[model] = read_code(model)
        return self._read[model]

    @property
    def digests(self) -> dict[str, str]:
        """Of what was read, by model."""
        found = ((model, None if code is None else code.digest) for model, code in self._read.items())
        return {model: each for model, each in found if each is not None}

    def require(self, code: Code, who: str, recorded: str | None = None) -> None:
        """Check that code may run; `who` names the model in messages.

        `recorded` is the digest (`Code.digest`) that whatever names the code says it has.

        Raises:
            TrustError: the user neither named nor trusts it.
            MismatchError: nor is it what was recorded.
        """
        if self._frees(code) or code.key in self.trust.listed:
            return
        if recorded is not None and code.digest is not None and code.digest != recorded:
            raise MismatchError(
                f"{who}: source_digest: expected the code that was recorded (digest {recorded}), found another at "
                f"{code.file} ({code.digest}), which was not run; restore it"
            )
        where = f"file {code.file}" if code.is_file else f"module {code.place} ({code.file or 'no source file'})"
        shown = f"{where}, SHA-256 {code.key}," if code.key is not None else where
        raise TrustError(
            f"{who}: expected code that you named or trust, found {shown} named by what you opened; nothing of it was "
            f"run. Read it; then, to run it this time, {self.trust.how}{how_to_trust(code.key)}"
        )

    @contextmanager
    def imported(self, code: Code, who: str) -> Iterator[ModuleType]:
        """The module that the code makes; while the block runs, a file may import its neighbours.

        Raises:
            TrustError: it may not run.
            Exception: whatever the code raises.
        """
        self.require(code, who)
        free = self._frees(code)
        if not code.is_file:
            yield self._import(code, free=free)
            return
        assert code.file is not None and code.source is not None
        folder = code.file.absolute().parent
        with beside(folder) if free else trusted_beside(folder, partial(self._require_neighbour, who)) as neighbours:
            yield execute(code.file, code.source)
            if code.name in self.trust.named:
                self.ran[sha256(code.source)] = str(code.file.absolute())
                for file in neighbours():
                    self.ran[sha256(read_regular(file, LARGEST_SOURCE))] = str(file)

    def _require_neighbour(self, who: str, file: Path, source: bytes) -> None:
        self.require(Code(str(file), "", file, source), who)

    def _frees(self, code: Code) -> bool:
        return self.trust.everything or code.name in self.trust.named

    def _import(self, code: Code, *, free: bool) -> ModuleType:
        if not free and code.file is not None and code.source is not None:
            with pinned(code.place, code.file, code.source):
                return importlib.import_module(code.place)
        module = importlib.import_module(code.place)
        file = getattr(module, "__file__", None)
        if code.name in self.trust.named and file is not None and file.endswith(".py"):
            self.ran[sha256(read_regular(Path(file), LARGEST_SOURCE))] = file
        return module
