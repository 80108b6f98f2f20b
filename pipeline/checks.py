"""What a run checks of its teachers against the caches that stand, before it writes anything."""

from collections.abc import Sequence
from dataclasses import dataclass

from cache import layout
from cache.errors import MismatchError, NotACacheError
from cache.locations import open_storage, stands
from cache.plans import load_plan, read_checked
from cache.published import STATISTICS
from cache.spec import TeacherSpec
from cache.statistics import Statistics, load_statistics, same_statistics
from cache.teachers import OWN_CALIBRATION, check_same, load_teacher, read_teacher, teacher_names
from pipeline.config import ExtractConfig


@dataclass(frozen=True)
class Calibration:
    """Statistics by output, and where they come from: a digest of the lender's file of them."""

    statistics: dict[str, Statistics]
    origin: str = OWN_CALIBRATION


def check_teachers(config: ExtractConfig, specs: Sequence[TeacherSpec]) -> None:
    """Compare loaded teachers with those of the same names in the cache at `out`, and in the one to calibrate from.

    Raises:
        MismatchError: one was made otherwise, or is not in the cache to take the calibration from.
        NotACacheError: there is no cache to take the calibration from.
    """
    storage = open_storage(config.out) if stands(config.out) else None
    published = set(teacher_names(storage)) if storage is not None else set()
    for spec in specs:
        borrowed = None if config.calibration_from is None else borrow(config.calibration_from, spec)
        if storage is None or spec.name not in published:
            continue
        standing = read_teacher(storage, spec.name)
        check_same(standing.spec, spec)
        if borrowed is not None:
            file = f"{layout.teacher(spec.name)}/{STATISTICS}"
            raw = read_checked(storage, file, standing.files[STATISTICS], teacher=spec.name)
            check_calibration(config, spec.name, load_statistics(raw, file)[0], borrowed)


def check_calibration(
    config: ExtractConfig, teacher: str, standing: dict[str, Statistics], borrowed: Calibration
) -> None:
    """Compare the statistics of a teacher that stands with those that it was to take over, value by value.

    Codecs without a grid need no calibration, but training standardises by it.

    Raises:
        MismatchError: they differ.
    """
    if not same_statistics(standing, borrowed.statistics):
        raise MismatchError(
            f"calibration_from: teacher {teacher!r} stands in {config.out} with another calibration than that "
            f"of {config.calibration_from}; extract it under a new teacher name or to another `out`"
        )


def borrow(path: str, spec: TeacherSpec) -> Calibration:
    """The calibration of the same teacher in the cache at `path`."""
    other = open_storage(path) if stands(path) else None
    plan = load_plan(other) if other is not None else None
    if other is None or plan is None:
        raise NotACacheError(f"calibration_from: {path}: expected a cache, found no plan.json there; check the path")
    names = teacher_names(other)
    if spec.name not in names:
        raise MismatchError(
            f"calibration_from: {path}: expected a teacher {spec.name!r}, found {', '.join(names) or 'none'}; extract "
            "it there first, or leave calibration_from out"
        )
    lender = load_teacher(other, plan, spec.name)
    try:
        check_same(lender.spec, spec)
    except MismatchError as error:
        raise MismatchError(f"calibration_from: {path}: {error}") from None
    return Calibration(lender.statistics, lender.files[STATISTICS])
