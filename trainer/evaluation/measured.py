"""Caches as a finished run sees them: its own statistics, and whatever of its teachers is there."""

from collections.abc import Sequence
from typing import Any, Final

from kpu.errors import ConfigError, MismatchError
from kpu.format.teacher import TeacherSpec
from kpu.reading.cache import open_cache
from kpu.reading.teachers import CachedTeacher
from trainer.data.corpus import Corpus
from trainer.evaluation.trained import Trained

_NOT_COMPARED: Final = "outputs"  # a cache may have more of them than the run reads


def wanted_outputs(trained: Trained) -> dict[str, tuple[str, ...]]:
    """The outputs that a run reads, by teacher: the targets of all, and for a side student the base's layers."""
    config = trained.config
    wanted = {name: tuple(config.outputs) for name in trained.sources}
    if config.student.kind == "side":
        wanted[config.base] = tuple(dict.fromkeys([*config.outputs, *config.student.layers]))
    return wanted


def open_measured(trained: Trained, paths: Sequence[str], notes: list[str], *, memory: int = 0) -> Corpus:
    """Caches with the base and those of the run's teachers that they have, in the run's units.

    What is left out is added to `notes`. Grids and statistics of the caches may be others than those of the training.

    Raises:
        ConfigError: a cache lacks the base, or an output of it, or is incomplete.
        MismatchError: the base, or a teacher, is another model than the run's.
        NotACacheError: there is no cache at a path.
    """
    wanted = wanted_outputs(trained)
    caches = [open_cache(path) for path in paths]
    base = trained.config.base
    for cache in caches:
        if base not in cache.teachers:
            raise ConfigError(
                f"cache {cache.path}: expected the base {base!r} of the run, found {sorted(cache.teachers)}"
            )
    present: dict[str, tuple[str, ...]] = {}
    for name, outputs in wanted.items():
        owners = [cache.teachers[name] for cache in caches if name in cache.teachers]
        lacking = [o for teacher in owners for o in outputs if o not in teacher.outputs]
        if not owners or (lacking and name != base):
            what = f"the output {lacking[0]!r} of {name!r}" if owners else repr(name)
            notes.append(f"teacher {name!r} is not measured: no {what} in {', '.join(paths)}")
            continue
        for teacher in owners:
            _check_same(trained.sources[name].spec, teacher, f"teacher {name!r}")
        present[name] = outputs
    corpus = Corpus(paths, present, base, memory=memory)
    corpus.sources = {name: trained.sources[name] for name in present}
    return corpus


def _check_same(spec: TeacherSpec, teacher: CachedTeacher, who: str) -> None:
    """Raises MismatchError if `teacher` has other features than the run's `spec` says."""
    expected, found = compared_part(spec), compared_part(teacher.spec)
    differing = [key for key in spec.model_differences(teacher.spec) if key != _NOT_COMPARED]
    if differing:
        parts = "; ".join(f"{key}: expected {expected.get(key)!r}, found {found.get(key)!r}" for key in differing)
        raise MismatchError(f"{who} is another model than the run's: {parts}; extract the cache with the same teacher")


def compared_part(spec: TeacherSpec) -> dict[str, Any]:
    """What a teacher must have in common with another to be the same model."""
    return {key: value for key, value in spec.model_part.items() if key != _NOT_COMPARED}
