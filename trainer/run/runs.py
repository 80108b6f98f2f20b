"""The folder of a run: what it was asked to do, what it learned from, how it went.

my-run/
  config.yaml              the resolved configuration, below a digest of all but `MAY_CHANGE`
  sources.json             the specs of the base and of all teachers, what identifies the caches, digests of
                           the next two
  statistics.safetensors   the calibration statistics of the training caches, by `<teacher>/<output>`
  heads.safetensors        the teachers' own linear classifiers
  environment.json         versions, device, threads
  metrics.jsonl            one object a logged step
  tensorboard/             the same as events
  space.json               what the gates measured of the shared space, if there is one
  checkpoints/step-*/      see `trainer.run.checkpoint`
  best/step-*/             see `trainer.loop.selection`
  last.safetensors         the weights after the last step, where `keep` chose others; or best.safetensors, likewise
  model.safetensors        the trained model
  summary.json             how it ended, and digests of the weights and of space.json; written last

`sources.json` and `summary.json` carry a digest of themselves as well.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from kpu.errors import ConfigError, CorruptError
from kpu.format.teacher import TeacherSpec
from kpu.reading.cache import Cache
from kpu.storage.places import redact
from kpu.util.digests import digest
from kpu.util.strict_json import parse_json, parse_json_object
from trainer.config import TrainConfig
from trainer.data.corpus import Corpus, TeacherInfo
from trainer.run.config_file import MAY_CHANGE, changed_keys, read_config, require_same
from trainer.run.measured import check_summary
from trainer.run.place import CONFIG, FOLDERS, SOURCE_FILES, check_place
from trainer.run.repeated import require_distinct
from trainer.run.sources import images_of, load_code, load_sources, load_specs, open_sources, pack_sources
from trainer.util.environment import environment
from trainer.util.files import (
    append_line,
    refuse_links,
    remove_folder,
    remove_made,
    replace_file,
    write_error,
)
from trainer.util.sealed import (
    ADVICE,
    DIGEST,
    DIGESTS,
    digests_in,
    dump_json,
    open_json,
    read_sealed,
    seal_json,
    seal_yaml,
    to_json,
)

_METRICS, _SPACE, _SUMMARY = "metrics.jsonl", "space.json", "summary.json"
MODEL: Final = "model.safetensors"
_LOCK: Final = "lock"
_SUMMARY_KEYS: Final = ("steps", "seconds", "parameters", "validation_rows", "validation")


class RunFolder:
    """A run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"
        self._made: list[str] = []
        self._is_new = False

    @property
    def lock(self) -> Path:
        """The file that a training holds locked."""
        return self.path / _LOCK

    @property
    def begun(self) -> bool:
        """Whether there is something to resume: the configuration is the last file that `create` writes."""
        return (self.path / CONFIG).exists()

    @staticmethod
    def create(path: Path, config: TrainConfig, corpus: Corpus, code: Mapping[str, str] | None = None) -> "RunFolder":
        """Begin a run. Paths of caches are kept absolute: what is done with the run may be called from elsewhere.

        `code` are the digests, by model, of the code that the student was built with.

        Raises:
            ConfigError: `path` exists already, or two of the caches are one.
            StorageError: it cannot be written there.
        """
        refuse_links(path, FOLDERS)
        check_place(path)
        run = RunFolder(path)
        require_distinct(corpus.caches)
        run._is_new = not path.exists()
        try:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, path) from error
        for name, data in pack_sources(corpus, code or {}).items():
            run._write(name, data)
        run._write_config(config, corpus)
        return run

    def discard(self) -> None:
        """Take away the files that this object wrote, and the folders if they are empty then."""
        remove_made(self.checkpoints, ())
        with suppress(OSError):
            if self.lock.stat().st_size == 0:
                self.lock.unlink()
        for name in self._made:
            with suppress(OSError):
                (self.path / name).unlink()
        if self._is_new:
            remove_made(self.path, ())

    @staticmethod
    def resume(path: Path, config: TrainConfig, corpus: Corpus) -> "RunFolder":
        """Go on with a run; what `MAY_CHANGE` of its configuration is kept as it is now, caches that moved included.

        Raises:
            ConfigError: there is no run.
            MismatchError: it was begun with another configuration or other caches.
        """
        run = RunFolder(path)
        difference = run.difference(config, corpus)
        require_same(path, [] if difference is None else [difference])
        run._write_config(config, corpus)
        return run

    def difference(self, config: TrainConfig, corpus: Corpus) -> str | None:
        """Where `config` and the caches of `corpus` would train something else than the run's; None if nowhere.

        Raises:
            ConfigError: there is no run here.
        """
        if changed := changed_keys(self.path, config):
            return "; ".join(changed)
        if self.has_caches(corpus):
            return None
        then, now = (", ".join(each["path"] for each in caches) for caches in (self.caches(), corpus.fingerprints()))
        return f"caches: begun with {then}, now {now}, whose plans or teachers are others (by their digests)"

    def has_caches(self, corpus: Corpus) -> bool:
        """Whether the caches of `corpus` are those that the run was begun with, wherever they are now."""
        then, now = ([{**each, "path": ""} for each in caches] for caches in (self.caches(), corpus.fingerprints()))
        return then == now

    def learned_from(self, cache: Cache) -> bool:
        """Whether the run was begun with the images of a cache: by its plan, or by where and what they are."""
        begun = open_sources(self.path)
        plans = {each["plan"] for each in begun["caches"]}
        images = [[redact(root), fingerprint] for root, fingerprint in begun.get("images", [])]
        return cache.plan.digest in plans or images_of(cache) in images

    def config(self) -> TrainConfig:
        """The resolved configuration.

        Raises:
            ConfigError: there is no run here.
            CorruptError: the file is damaged.
        """
        return read_config(self.path)

    def caches(self) -> list[dict[str, Any]]:
        """What `Corpus.fingerprints` said when the run was begun. Raises as `sources`."""
        found: list[dict[str, Any]] = open_sources(self.path)["caches"]
        return found

    def code(self) -> dict[str, str]:
        """The digest by model of the code that the student was built with; empty if it has none, or none was kept.

        Raises as `sources`.
        """
        return load_code(self.path)

    def sources(self) -> dict[str, TeacherInfo]:
        """The teachers of the run, base included, with the statistics that it was trained with.

        Raises:
            CorruptError: a file is damaged or missing.
        """
        return load_sources(self.path)

    def specs(self) -> dict[str, TeacherSpec]:
        """Those of the teachers, base included. Raises as `sources`."""
        return load_specs(self.path)

    def model(self) -> dict[str, Tensor]:
        """The trained model, on the CPU; what else was written last is checked with it.

        Raises:
            ConfigError: the run has not ended.
            CorruptError: a file is damaged or missing.
        """
        file, digests = self.path / MODEL, self._digests()
        if not digests and not file.is_file():
            raise ConfigError(
                f"{self.path}: expected a run that ended, found no {MODEL}; finish it with `kpu-train fit --resume`"
            )
        kept = {name: read_sealed(self.path / name, digests.get(name)) for name in (MODEL, *digests)}
        try:
            return load_tensors(kept[MODEL])
        except SafetensorError as error:
            raise CorruptError(str(file), f"holds no tensors ({error}); {ADVICE}") from None

    def unchecked(self) -> list[str]:
        """Files of which no digest was kept, as in runs of older releases: damage to them may not show."""
        kept = {**digests_in(open_sources(self.path), self.path), **self._digests(), **self.code()}
        model = self.config().student.model or ""
        names = (*SOURCE_FILES[:2], MODEL, *([model] if model.startswith("torch:") else []))
        return [name for name in names if name not in kept]

    def write_environment(self, values: Mapping[str, Any]) -> None:
        """Keep what the run runs on; a resumed run appends to what exists.

        Raises:
            CorruptError: a file of the run is damaged.
        """
        file = self.path / "environment.json"
        try:
            former = parse_json(read_sealed(file, None)) if file.exists() else []
            if not isinstance(former, list):
                raise ValueError(f"found {type(former).__name__}")
        except ValueError as error:
            raise CorruptError(str(file), f"is no list in JSON ({error}); remove it to go on without") from None
        self._write(file.name, dump_json([*former, {**environment(), **values}]))

    def metrics(self) -> list[dict[str, Any]]:
        """What was logged, in order; a last line that a crash cut off is left out.

        Raises:
            CorruptError: another line is damaged.
        """
        file, found = self.path / _METRICS, list[dict[str, Any]]()
        for number, line in enumerate(read_sealed(file, None).split(b"\n")[:-1] if file.exists() else [], start=1):
            try:
                logged = parse_json_object(line)
                if type(logged["step"]) is not int:
                    raise ValueError("step")
                found.append(logged)
            except (ValueError, KeyError):
                raise CorruptError(
                    str(file), f"line {number}: expected an object in JSON with a step, found another; remove the line"
                ) from None
        return found

    def keep_metrics(self, step: int) -> None:
        """Forget what was logged after `step`: it will be done again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        self._write(_METRICS, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one object."""
        append_line(self.path / _METRICS, json.dumps(to_json(line)))

    def finish(self, weights: Mapping[str, bytes], summary: Mapping[str, Any]) -> None:
        """Keep the trained model, other weights beside it and, last, how the run ended; NaN becomes null."""
        for name, data in weights.items():
            self._write(name, data)
        digests = {name: digest(data) for name, data in weights.items()}
        if (self.path / _SPACE).exists():
            digests[_SPACE] = digest(read_sealed(self.path / _SPACE, None))
        self._write(_SUMMARY, seal_json({**summary, DIGESTS: digests}))
        remove_folder(self.path, self.best.name)

    def summary(self) -> dict[str, Any] | None:
        """How the run ended; None if it has not.

        Raises:
            CorruptError: the file is damaged.
        """
        if not (self.path / _SUMMARY).exists():
            return None
        return {key: value for key, value in self._summary().items() if key not in (DIGEST, DIGESTS)}

    def write_space(self, figures: Mapping[str, float]) -> None:
        """Keep what the gates measured of the shared space, by `<teacher>/<output>/<figure>`."""
        self._write(_SPACE, dump_json(figures))

    def _write_config(self, config: TrainConfig, corpus: Corpus) -> None:
        resolved = config.model_copy(update={"caches": tuple(cache.path for cache in corpus.caches)})
        if not self.begun or self.config() != resolved:
            self._write(CONFIG, seal_yaml(resolved.model_dump(mode="json"), MAY_CHANGE))

    def _summary(self) -> dict[str, Any]:
        document, file = open_json(self.path / _SUMMARY, _SUMMARY_KEYS), self.path / _SUMMARY
        check_summary(document, file, ADVICE)
        return document

    def _digests(self) -> dict[str, str]:
        """Of the files that were written last, by name; none where the run has not ended, or had none."""
        return digests_in(self._summary(), self.path / _SUMMARY) if (self.path / _SUMMARY).exists() else {}

    def _write(self, name: str, data: bytes) -> None:
        if not (self.path / name).exists():
            self._made.append(name)
        replace_file(self.path / name, data)
