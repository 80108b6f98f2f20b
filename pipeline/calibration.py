"""Calibrating teachers before their first unit. Drivers agree, because each uses what was published first."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

import numpy as np

from kpu.commit.teacher import existing_statistics, publish_teacher
from kpu.errors import ConfigError
from kpu.format.codecs import QuantGrid, make_grid
from kpu.format.plan import Plan
from kpu.format.statistics import Statistics
from kpu.format.teacher import TeacherSpec
from kpu.records.teachers import teacher_names
from kpu.storage.base import Storage
from pipeline.checks import Calibration, check_calibration, load_calibration_from
from pipeline.config import ExtractConfig
from pipeline.executors import Executor
from pipeline.run.observers import Observer
from pipeline.worker.worker import TeacherDescription

ROWS_PER_CHANNEL: Final = 10  # where a covariance is used
USUAL_ROWS: Final = 2048  # for means and standard deviations, whatever the number of channels
ROUGH_ROWS: Final = 256  # with fewer, standard deviations are off by a tenth and more
USUAL: Final = 3.3  # standard deviations from the mean; of a normal distribution, 1 value in 1,000 is further away
_STREAM: Final = 0x6B70752D63616C69  # apart from other uses of the plan's seed


def calibrate_teachers(
    storage: Storage,
    plan: Plan,
    config: ExtractConfig,
    teachers: Sequence[TeacherDescription],
    executor: Executor,
    run: str,
    observer: Observer,
) -> None:
    """Publish each teacher that the cache lacks. Those that it has were compared by `pipeline.checks`.

    Raises:
        MismatchError: another run published another teacher of that name meanwhile.
        NonFiniteError, SourceError: a teacher cannot be calibrated on these images.
        ConfigError: the step of a codec is so small that usual values would saturate.
    """
    published = set(teacher_names(storage))
    missing = [teacher for teacher in teachers if teacher.spec.name not in published]
    calibrations = _calibrations(storage, plan, config, [t.spec for t in missing], executor, observer)
    for teacher in missing:
        check_range(teacher.spec, calibrations[teacher.spec.name].statistics)
    for teacher in missing:
        made = calibrations[teacher.spec.name]
        existing = publish_teacher(
            storage, plan, teacher.spec, made.statistics, teacher.head, run, calibration=made.origin
        )
        if config.calibration_from is not None:
            check_calibration(config, teacher.spec.name, existing.statistics, made)


def _calibrations(
    storage: Storage,
    plan: Plan,
    config: ExtractConfig,
    specs: Sequence[TeacherSpec],
    executor: Executor,
    observer: Observer,
) -> dict[str, Calibration]:
    if config.calibration_from is not None:
        return {spec.name: load_calibration_from(config.calibration_from, spec) for spec in specs}
    found: dict[str, Calibration] = {}
    for spec in specs:
        if (existing := existing_statistics(storage, spec)) is not None:
            found[spec.name] = Calibration(existing)
    pending = [spec for spec in specs if spec.name not in found]
    if pending:
        for spec in pending:
            if (warning := thin_calibration(spec, wanted_rows(spec, config), plan.rows)) is not None:
                observer.warn(warning)
        for wanted in sorted({wanted_rows(spec, config) for spec in pending}):
            names = [spec.name for spec in pending if wanted_rows(spec, config) == wanted]
            rows = choose_rows(plan, wanted)
            why = f", {ROWS_PER_CHANNEL} for each channel, as codec rotated needs" if wanted > USUAL_ROWS else ""
            why = why if config.calibration_rows == "auto" else ""
            observer.phase("calibrate", f"{', '.join(names)} on {len(rows):,} rows{why}")
            tell = partial(observer.progress, "calibrate", len(rows))
            computed = executor.call("calibrate", names, rows, progress=tell)
            found |= {name: Calibration(statistics) for name, statistics in computed.items()}
    return found


def wanted_rows(spec: TeacherSpec, config: ExtractConfig) -> int:
    """How many rows a teacher is calibrated on, where there are as many.

    `auto` is 2,048; under `rotated`, whose axes come from the covariance, 10 rows for each channel of the widest output
    if that is more.
    """
    if config.calibration_rows != "auto":
        return config.calibration_rows
    widest = max(output.channels for output in spec.outputs)
    return max(USUAL_ROWS, ROWS_PER_CHANNEL * widest) if spec.codec.name == "rotated" else USUAL_ROWS


def choose_rows(plan: Plan, wanted: int) -> np.ndarray:
    """Sorted, distinct row numbers, int64: one drawn from each of `wanted` equal stretches of the plan.

    There are never more than the plan has.
    """
    count = min(wanted, plan.rows)
    edges = np.arange(count + 1, dtype=np.int64) * plan.rows // count
    draws = np.random.Philox(key=[plan.seed, _STREAM]).random_raw(count)  # this stream is fixed by NumPy's contract
    chosen: np.ndarray = edges[:-1] + (draws % np.diff(edges).astype(np.uint64)).astype(np.int64)
    return chosen


def check_range(spec: TeacherSpec, statistics: Mapping[str, Statistics]) -> None:
    """Refuse a step so small that the integers do not reach as far as one value in a thousand lies.

    Raises:
        ConfigError: naming the least step that does.
    """
    for output, found in statistics.items():
        if spec.codec.step is None:
            continue
        grid = make_grid(spec.codec, found)
        needed = USUAL * _widest(grid, found)
        room = (grid.limit - int(np.abs(grid.offset).max())) * spec.codec.step
        if room < needed:
            raise ConfigError(
                f"teacher {spec.name!r}, output {output!r}: codec.step: expected at least "
                f"{spec.codec.step * needed / room:.2g}, found {spec.codec.step:g}: the stored integers would reach "
                f"{room:.2g} standard deviations of a channel, and values lie as far as {needed:.2g}; use a larger "
                "step, or codec.name fp16 or fp32"
            )


def _widest(grid: QuantGrid, statistics: Statistics) -> float:
    """The standard deviation of what is counted in steps, in those of channels; on axes, the largest."""
    if grid.axes is None:
        return 1.0
    axes = grid.axes.astype(np.float64)
    correlation = statistics.covariance / np.outer(statistics.std, statistics.std)
    return float(np.sqrt(np.einsum("ij,ij->i", axes @ correlation, axes).max()))


def thin_calibration(spec: TeacherSpec, wanted: int, most: int) -> str | None:
    """A warning where `wanted` rows, or all of `most`, are too few for a teacher's `global`; None if they suffice."""
    rows = min(wanted, most)
    channels = max((output.channels for output in spec.outputs if output.grid is None), default=0)
    if channels and rows < ROUGH_ROWS:
        fewer = f"fewer than {ROUGH_ROWS}"
    elif spec.codec.name == "rotated" and rows < ROWS_PER_CHANNEL * channels:
        fewer = f"fewer than {ROWS_PER_CHANNEL} for each of the {channels} channels of its global output"
    else:
        return None
    advice = "use more images" if rows == most else "raise calibration_rows"
    return f"teacher {spec.name!r}: calibrated on {rows} rows, {fewer}: the statistics are rough; {advice}"
