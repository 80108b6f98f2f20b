"""What a run checks of its teachers, against existing caches and the classes of the data."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import pyarrow.compute as pc

from kpu.commit.teacher import OWN_CALIBRATION, check_same
from kpu.errors import ConfigError, MismatchError, NotACacheError
from kpu.format.plan import Plan
from kpu.format.statistics import Statistics, load_statistics, same_statistics
from kpu.format.teacher import NO_LABEL, TeacherSpec
from kpu.records.plan import load_plan, read_checked
from kpu.records.samples import Samples
from kpu.records.teachers import STATISTICS, load_teacher, read_teacher, teacher_names
from kpu.sources import ImageSource
from kpu.storage import paths
from kpu.storage.found import describe_place
from kpu.storage.open import location_exists, open_storage
from pipeline.config import ExtractConfig
from pipeline.run.observers import Observer


@dataclass(frozen=True)
class Calibration:
    """Statistics by output, and where they come from: a digest of the lender's file of them."""

    statistics: dict[str, Statistics]
    origin: str = OWN_CALIBRATION
    meanings: tuple[int | str, ...] = ()
    """What the outputs of the lender's head mean, by the names of its classes; empty if nothing says."""


def check_teachers(config: ExtractConfig, specs: Sequence[TeacherSpec], classes: Sequence[str] | None) -> None:
    """Compare loaded teachers with those of the same names in the cache at `out`, and in the one to calibrate from.

    The labels of those that are new are compared with the data's `classes`, where it names them.

    Raises:
        ConfigError: a label is no class of the data, or another one than in the cache to calibrate from.
        MismatchError: one was made otherwise, or is not in the cache to take the calibration from.
        NotACacheError: there is no cache to take the calibration from.
    """
    storage = open_storage(config.out) if location_exists(config.out) else None
    published = set(teacher_names(storage)) if storage is not None else set()
    for spec in specs:
        borrowed = None if config.calibration_from is None else load_calibration_from(config.calibration_from, spec)
        if storage is None or spec.name not in published:
            _check_labels(spec, classes)
            if borrowed is not None:
                _check_meanings(config, spec, classes, borrowed)
            continue
        existing = read_teacher(storage, spec.name)
        check_same(existing.spec, spec)
        if borrowed is not None:
            file = f"{paths.teacher(spec.name)}/{STATISTICS}"
            raw = read_checked(storage, file, existing.files[STATISTICS], teacher=spec.name)
            check_calibration(config, spec.name, load_statistics(raw, file)[0], borrowed)


def _some(names: Sequence[int | str]) -> str:
    """A few names as a configuration file has them."""
    shown = ("null" if name == NO_LABEL else repr(name) for name in names[:10])
    return ", ".join(shown) + (", ..." if len(names) > 10 else "")


def warn_of_order(source: ImageSource, observer: Observer) -> None:
    """Warn where the names of class folders are numbers, and labels are others: positions in the order of the names."""
    names = source.classes or ()
    if source.spec.kind != "folder" or not all(name.isascii() and name.isdigit() for name in names):
        return
    wrong = [(name, label) for label, name in enumerate(names) if int(name) != label]
    if wrong:
        found = ", ".join(f"{name!r} has label {label}" for name, label in wrong[:3])
        observer.warn(
            f"data.source: the folders' names are numbers, but labels are their positions in the order of text: {found}"
            f"{', ...' if len(wrong) > 3 else ''}; name them in teachers' `labels` (as '{wrong[0][0]}'), or name the "
            "folders from 0 with leading zeros"
        )


def warn_of_heads(specs: Sequence[TeacherSpec], observer: Observer) -> None:
    """Warn of teachers whose classifier the cache will not hold."""
    for spec in specs:
        if spec.no_head is not None:
            observer.warn(f"teacher {spec.name!r}: keeps no head: {spec.no_head}; nothing else of it is missing")


def _check_labels(spec: TeacherSpec, classes: Sequence[str] | None) -> None:
    known = range(len(classes)) if classes is not None else range(sys.maxsize)
    labels = spec.labels or ()
    numbers = {label for label in labels if isinstance(label, int) and label != NO_LABEL}
    outside = sorted(label for label in numbers if label not in known)
    who = f"teacher {spec.name!r}: labels"
    if outside:
        expected = f"numbers from 0 to {known[-1]}, the data's classes" if classes else "numbers from 0"
        raise ConfigError(f"{who}: expected {expected}, or null for none of them, found {', '.join(map(str, outside))}")
    names = [label for label in labels if isinstance(label, str)]
    twice = next((name for name in names if (classes or ()).count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{who}: expected names of one class each, found {twice!r} of several; give numbers instead")
    if names and not set(names) & set(classes or ()):
        expected = (
            f"names of the data's classes, {_some(classes)}," if classes else "numbers, for the data names no class,"
        )
        raise ConfigError(f"{who}: expected {expected} or null for none of them, found {_some(names)}")


def warn_of_labels(specs: Sequence[TeacherSpec], plan: Plan, samples: Samples, observer: Observer) -> None:
    """Warn of teachers' labels that no class of the data has: names, or numbers above all where it names none.

    It is no error, for the data may be a part without images of some classes.
    """
    if plan.classes is not None:
        _warn_of_names(specs, plan.classes, observer)
        return
    wanted = {spec.name: max(filter(_is_number, spec.labels)) for spec in specs if spec.labels}
    if not wanted:
        return
    largest: int | None = None
    for part in samples.iter_batches(["label"]):
        found = pc.max(part["label"]).as_py()
        if found is not None and found >= 0 and (largest is None or found > largest):  # below 0: no label
            largest = found
        if largest is not None and largest >= max(wanted.values()):
            return  # shuffled data shows it in its first part
    for name, label in wanted.items():
        if largest is not None and label > largest:
            observer.warn(
                f"teacher {name!r}: labels: expected numbers up to {largest}, the largest label in the data, found "
                f"{label}; that is right only if the data lacks images of this class"
            )


def _is_number(label: int | str) -> TypeGuard[int]:
    return isinstance(label, int)


def _warn_of_names(specs: Sequence[TeacherSpec], classes: Sequence[str], observer: Observer) -> None:
    for spec in specs:
        lacking = [label for label in spec.labels or () if isinstance(label, str) and label not in classes]
        if lacking:
            observer.warn(
                f"teacher {spec.name!r}: labels: expected names of the data's classes, {_some(classes)}, found "
                f"{_some(lacking)}; that is right only if the data lacks images of these classes"
            )


def check_calibration(
    config: ExtractConfig, teacher: str, existing: dict[str, Statistics], borrowed: Calibration
) -> None:
    """Compare the statistics of an existing teacher with those that it was to take over, value by value.

    Codecs without a grid need no calibration, but training standardises by it.

    Raises:
        MismatchError: they differ.
    """
    if not same_statistics(existing, borrowed.statistics):
        raise MismatchError(
            f"calibration_from: teacher {teacher!r} exists in {config.out} with another calibration than that "
            f"of {config.calibration_from}; extract it under a new teacher name or to another `out`"
        )


def load_calibration_from(path: str, spec: TeacherSpec) -> Calibration:
    """The calibration of the same teacher in the cache at `path`."""
    other = open_storage(path) if location_exists(path) else None
    plan = load_plan(other) if other is not None else None
    if other is None or plan is None:
        raise NotACacheError(
            f"calibration_from: {path}: expected a cache, found {describe_place(path)}; check the path"
        )
    names = teacher_names(other)
    if spec.name not in names:
        raise MismatchError(
            f"calibration_from: {path}: expected a teacher {spec.name!r}, found {', '.join(names) or 'none'}; extract "
            "it there first, or leave calibration_from out"
        )
    lender = load_teacher(other, plan, spec.name)
    try:
        check_same(lender.spec, spec.model_copy(update={"labels": lender.spec.labels}))  # they calibrate nothing
    except MismatchError as error:
        raise MismatchError(f"calibration_from: {path}: {error}") from None
    return Calibration(lender.statistics, lender.files[STATISTICS], _meanings(lender.spec, plan.classes))


def _meanings(spec: TeacherSpec, classes: Sequence[str] | None) -> tuple[int | str, ...]:
    """What the outputs of a head mean, by name; empty if nobody says, or the data names no class."""
    if classes is None or spec.labels is None:
        return ()
    return tuple(
        classes[label] if isinstance(label, int) and 0 <= label < len(classes) else label for label in spec.labels
    )


def _check_meanings(
    config: ExtractConfig, spec: TeacherSpec, classes: Sequence[str] | None, borrowed: Calibration
) -> None:
    """Refuse labels that mean other classes than in the cache to calibrate from: a test set that lacks a class, say."""
    for output, (there, here) in enumerate(zip(borrowed.meanings, _meanings(spec, classes), strict=False)):
        if there != here:
            raise ConfigError(
                f"teacher {spec.name!r}: labels: expected output {output} to mean class {there!r}, as in "
                f"{config.calibration_from} (calibration_from), found {here!r}: numbers mean other classes here; name "
                f"them, as labels: [{_some(borrowed.meanings)}]"
            )
