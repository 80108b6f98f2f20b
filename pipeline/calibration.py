"""Publishing every teacher's calibration before its first unit: two drivers agree because both use what stands."""

from collections.abc import Sequence
from dataclasses import dataclass

from cache.errors import MismatchError, NotACacheError
from cache.locations import open_storage
from cache.plans import load_plan
from cache.spec import Plan, TeacherSpec
from cache.statistics import Statistics
from cache.storage import Storage
from cache.teachers import (
    OWN_CALIBRATION,
    check_same,
    load_teacher,
    publish_teacher,
    read_teacher,
    standing_statistics,
    teacher_names,
)
from pipeline.calibrate import choose_rows, thin_calibration
from pipeline.config import ExtractConfig
from pipeline.executors import Executor
from pipeline.observers import Observer
from pipeline.worker import Description


@dataclass(frozen=True)
class _Calibration:
    """Statistics by output, and where they come from."""

    statistics: dict[str, Statistics]
    origin: str = OWN_CALIBRATION


def calibrate_teachers(
    storage: Storage,
    plan: Plan,
    config: ExtractConfig,
    teachers: Sequence[Description],
    executor: Executor,
    run: str,
    observer: Observer,
) -> None:
    """Publish each teacher that the cache lacks; check each that it has.

    Raises:
        MismatchError: the cache, or the cache to take the calibration from, holds another teacher of that name.
    """
    published = set(teacher_names(storage))
    for teacher in teachers:
        if teacher.spec.name in published:
            _check_standing(storage, config, teacher.spec)
    missing = [teacher for teacher in teachers if teacher.spec.name not in published]
    calibrations = _calibrations(storage, plan, config, [t.spec for t in missing], executor, observer)
    for teacher in missing:
        made = calibrations[teacher.spec.name]
        publish_teacher(storage, plan, teacher.spec, made.statistics, teacher.head, run, calibration=made.origin)


def _check_standing(storage: Storage, config: ExtractConfig, spec: TeacherSpec) -> None:
    standing = read_teacher(storage, spec.name)
    check_same(standing.spec, spec)
    if config.calibration_from is not None:
        borrowed = _borrow(config.calibration_from, spec)
        if borrowed.origin != standing.encoding_fingerprint:
            raise MismatchError(
                f"calibration_from: teacher {spec.name!r} stands in this cache with another calibration than that of "
                f"{config.calibration_from}; extract it under a new teacher name or to another `out`"
            )


def _calibrations(
    storage: Storage,
    plan: Plan,
    config: ExtractConfig,
    specs: Sequence[TeacherSpec],
    executor: Executor,
    observer: Observer,
) -> dict[str, _Calibration]:
    if config.calibration_from is not None:
        return {spec.name: _borrow(config.calibration_from, spec) for spec in specs}
    found: dict[str, _Calibration] = {}
    for spec in specs:
        if (standing := standing_statistics(storage, spec)) is not None:
            found[spec.name] = _Calibration(standing)
    pending = [spec for spec in specs if spec.name not in found]
    if pending:
        widest = max(output.channels for spec in pending for output in spec.outputs)
        rows = choose_rows(plan, widest, config.calibration_rows)
        for spec in pending:
            if (warning := thin_calibration(spec, len(rows))) is not None:
                observer.warn(warning)
        names = [spec.name for spec in pending]
        observer.phase("calibrate", f"{', '.join(names)} on {len(rows):,} rows")
        computed = executor.call("calibrate", names, rows)
        found |= {name: _Calibration(statistics) for name, statistics in computed.items()}
    return found


def _borrow(path: str, spec: TeacherSpec) -> _Calibration:
    """The statistics of the same teacher in another cache."""
    other = open_storage(path)
    plan = load_plan(other)
    if plan is None:
        raise NotACacheError(f"calibration_from: expected a cache at {path}, found no plan.json there")
    names = teacher_names(other)
    if spec.name not in names:
        raise MismatchError(
            f"calibration_from: {path} has no teacher {spec.name!r}, only {', '.join(names) or 'none'}; extract it "
            "there first, or leave calibration_from out"
        )
    lender = load_teacher(other, plan, spec.name)
    check_same(lender.spec, spec)
    return _Calibration(lender.statistics, lender.encoding_fingerprint)
