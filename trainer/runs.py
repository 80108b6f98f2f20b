"""The folder of a run: what it was asked to do, what it learned from, how it went.

my-run/
  config.yaml              the resolved configuration
  sources.json             the specs of the base and of all teachers, and what identifies the caches
  statistics.safetensors   the calibration statistics of the training caches, by `<teacher>/<output>`
  heads.safetensors        the teachers' own linear classifiers
  environment.json         versions, device, threads
  metrics.jsonl            one object a logged step
  tensorboard/             the same as events
  space.json               what the gates measured of the shared space, where there is one
  checkpoints/step-*/      see `trainer.checkpoint`
  model.safetensors        the trained model, written last
  summary.json             how it ended
"""

import json
import math
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from cache import Cache
from cache.errors import ConfigError, CorruptError, MismatchError
from cache.spec import TeacherSpec
from cache.statistics import dump_statistics, load_statistics
from trainer.config import TrainConfig, validate_config
from trainer.corpus import Corpus, Source
from trainer.files import replace_file, write_error
from trainer.shapes import shape_of

MAY_CHANGE: Final = frozenset({"caches", "images", "loader", "log", "workers"})
"""Keys that a run may be resumed with other values of: none of them decides what is learned."""

_CONFIG, _SOURCES, _STATISTICS, _HEADS = "config.yaml", "sources.json", "statistics.safetensors", "heads.safetensors"
_FIRST: Final = (_SOURCES, _STATISTICS, _HEADS)
_METRICS, _SPACE, _SUMMARY = "metrics.jsonl", "space.json", "summary.json"
MODEL: Final = "model.safetensors"
_PACKAGES = ("kpu", "torch", "timm", "numpy", "zarr", "ray")


class RunFolder:
    """A run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    @property
    def begun(self) -> bool:
        """Whether there is something to resume: the configuration is the last file that `create` writes."""
        return (self.path / _CONFIG).exists()

    @staticmethod
    def create(path: Path, config: TrainConfig, corpus: Corpus) -> "RunFolder":
        """Begin a run. Paths of caches are kept absolute: what is done with the run may be called from elsewhere.

        Raises:
            ConfigError: something stands at `path` already, or two paths are those of one cache.
            StorageError: it cannot be written there.
        """
        run = RunFolder(path)
        if run.begun:
            raise ConfigError(f"out: {path}: a run stands there; continue it with --resume, or choose another folder")
        if path.exists() and (not path.is_dir() or any(not _begins(file) for file in path.iterdir())):
            raise ConfigError(f"out: {path}: expected a new path or an empty folder, found other files; choose another")
        paths = tuple(cache.path for cache in corpus.caches)
        twice = next((cache for cache in paths if paths.count(cache) > 1), None)
        if twice is not None:
            raise ConfigError(f"caches: expected each cache once, found {twice} again; remove one")
        try:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, path) from error
        sources = corpus.sources
        statistics = {f"{name}/{o}": s for name, source in sources.items() for o, s in source.statistics.items()}
        heads: dict[str, np.ndarray[Any, Any]] = {}
        for name, source in sources.items():
            if source.head is not None:
                heads |= {f"{name}.weight": source.head[0], f"{name}.bias": source.head[1]}
        run._write(_STATISTICS, dump_statistics(statistics, {}))
        run._write(_HEADS, save_arrays(heads))
        document = {
            "teachers": {name: source.spec.model_dump(mode="json") for name, source in sources.items()},
            "seeds": {name: source.seed for name, source in sources.items()},
            "caches": corpus.fingerprints(),
            "images": [_images_of(cache) for cache in corpus.caches],
        }
        run._write(_SOURCES, _json(document))
        run._write_config(config, corpus)
        return run

    def discard(self) -> None:
        """Take away what `create` made, as far as that is possible."""
        shutil.rmtree(self.path, ignore_errors=True)

    @staticmethod
    def resume(path: Path, config: TrainConfig, corpus: Corpus) -> "RunFolder":
        """Go on with a run; what `MAY_CHANGE` of its configuration is kept as it is now, caches that moved included.

        Raises:
            ConfigError: there is no run.
            MismatchError: it was begun with another configuration or other caches.
        """
        run = RunFolder(path)
        difference = run.difference(config, corpus)
        if difference is not None:
            raise MismatchError(
                f"{path}: expected what the run was begun with, found {difference}; give the same, or start a new run"
            )
        run._write_config(config, corpus)
        return run

    def difference(self, config: TrainConfig, corpus: Corpus) -> str | None:
        """Where `config` and the caches of `corpus` would train something else than the run's; None where nowhere.

        Raises:
            ConfigError: there is no run here.
        """
        begun, asked = (each.model_dump(mode="json") for each in (self.config(), config))
        changed = [key for key in asked if key not in MAY_CHANGE and begun[key] != asked[key]]
        if changed:
            return "; ".join(f"{key}: begun with {begun[key]!r}, now {asked[key]!r}" for key in changed)
        if self.has_caches(corpus):
            return None
        then, now = (", ".join(each["path"] for each in caches) for caches in (self._caches(), corpus.fingerprints()))
        return f"caches: begun with {then}, now {now}, whose plans or teachers are others (by their digests)"

    def has_caches(self, corpus: Corpus) -> bool:
        """Whether the caches of `corpus` are those that the run was begun with, wherever they are now."""
        then, now = ([{**each, "path": ""} for each in caches] for caches in (self._caches(), corpus.fingerprints()))
        return then == now

    def learned_from(self, cache: Cache) -> bool:
        """Whether the run was begun with the images of a cache: by its plan, or by where and what they are."""
        plans = {each["plan"] for each in self._caches()}
        return cache.plan.digest in plans or _images_of(cache) in self._sources().get("images", [])

    def config(self) -> TrainConfig:
        """The resolved configuration.

        Raises:
            ConfigError: there is no run here.
        """
        file = self.path / _CONFIG
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"{self.path}: expected a run of kpu-train, found no {_CONFIG} ({error.strerror}); check the path"
            ) from None
        return validate_config(values, str(file))

    def sources(self) -> dict[str, Source]:
        """The teachers of the run, base included, with the statistics that it was trained with.

        Raises:
            CorruptError: a file is damaged or missing.
        """
        document = self._sources()
        specs = {name: TeacherSpec.model_validate(spec) for name, spec in document["teachers"].items()}
        statistics, _ = load_statistics(self._read(_STATISTICS), _STATISTICS)
        try:
            heads = load_arrays(self._read(_HEADS))
        except SafetensorError as error:
            raise CorruptError(str(self.path / _HEADS), f"holds no heads ({error})") from None
        found = {}
        for name, spec in specs.items():
            own = {key.partition("/")[2]: value for key, value in statistics.items() if key.partition("/")[0] == name}
            shapes = {output.name: shape_of(output) for output in spec.outputs if output.name in own}
            head = (heads[f"{name}.weight"], heads[f"{name}.bias"]) if f"{name}.weight" in heads else None
            found[name] = Source(spec, shapes, own, head, document["seeds"][name])
        return found

    def write_environment(self, values: Mapping[str, Any]) -> None:
        """Keep what the run runs on; a resumed run appends to what stands."""
        file = self.path / "environment.json"
        former = json.loads(file.read_bytes()) if file.exists() else []
        self._write(file.name, _json([*former, {**_environment(), **values}]))

    def metrics(self) -> list[dict[str, Any]]:
        """What was logged, in order; a last line that a crash cut off is left out."""
        file = self.path / _METRICS
        if not file.exists():
            return []
        lines = file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def keep_metrics(self, step: int) -> None:
        """Forget what was logged after `step`: it will be done again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        self._write(_METRICS, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one object."""
        try:
            with (self.path / _METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(_plain(line)) + "\n")
        except OSError as error:
            raise write_error(error, self.path / _METRICS) from error

    def write_summary(self, values: Mapping[str, Any]) -> None:
        """Keep how the run ended; a figure that is not a number becomes null."""
        self._write(_SUMMARY, _json(values))

    def summary(self) -> dict[str, Any] | None:
        """How the run ended; None where it has not."""
        file = self.path / _SUMMARY
        return json.loads(file.read_bytes()) if file.exists() else None

    def write_space(self, figures: Mapping[str, float]) -> None:
        """Keep what the gates measured of the shared space, by `<teacher>/<output>/<figure>`."""
        self._write(_SPACE, _json(figures))

    def write_model(self, data: bytes) -> None:
        """Keep the trained model."""
        self._write(MODEL, data)

    def _write_config(self, config: TrainConfig, corpus: Corpus) -> None:
        resolved = config.model_copy(update={"caches": tuple(cache.path for cache in corpus.caches)})
        if not self.begun or self.config() != resolved:
            self._write(_CONFIG, yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False).encode())

    def _caches(self) -> list[dict[str, Any]]:
        """What `Corpus.fingerprints` said when the run was begun."""
        caches: list[dict[str, Any]] = self._sources()["caches"]
        return caches

    def _sources(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self._read(_SOURCES))
        return loaded

    def _read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise CorruptError(str(self.path / name), f"cannot be read ({error.strerror})") from None

    def _write(self, name: str, data: bytes) -> None:
        replace_file(self.path / name, data)


def _environment() -> dict[str, Any]:
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


def _images_of(cache: Cache) -> list[str]:
    """Where the images of a cache are, and the digest of what they are called; other caches may be of the same."""
    return [cache.plan.source.root, cache.plan.fingerprint]


def _begins(file: Path) -> bool:
    """Whether a file is one that a run which never began may have left."""
    if file.name == "checkpoints":
        return file.is_dir() and not any(file.iterdir())
    return file.name in _FIRST or file.name.startswith(tuple(f".{name}." for name in (*_FIRST, _CONFIG)))


def _json(value: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return (json.dumps(_plain(value), indent=1, ensure_ascii=False) + "\n").encode()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
