"""`--dry-run`: what an extraction would take, measured on a few batches of the real source with the real teachers."""

import sys
from collections.abc import Sequence

import pyarrow as pa

from kpu.format.base import Frozen
from kpu.format.plan import Plan
from kpu.format.teacher import TeacherSpec
from kpu.records.teachers import teacher_names
from kpu.records.units import count_rows, units_left
from kpu.sources import ImageSource
from kpu.sources.rows import listed_rows
from kpu.storage.open import open_storage
from kpu.storage.places import redact
from pipeline.calibration import wanted_rows
from pipeline.checks import check_teachers
from pipeline.config import ExtractConfig
from pipeline.executors import open_executor
from pipeline.paths import resolve_paths
from pipeline.planning import check_listing, check_settings, choose_threads, choose_unit_rows, open_data, tell_left_out
from pipeline.run.observers import Observer
from pipeline.run.records import new_run_id
from pipeline.target import existing_plan
from pipeline.teachers import ship
from pipeline.worker.measure import Measurement
from pipeline.worker.worker import WorkerSetup

WARM_BATCHES, TIMED_BATCHES = 1, 3


class Estimate(Frozen):
    """What a run would cost; what an existing cache has already is left out.

    `rows_left` of `rows` lack a teacher. `bytes_per_row` is by teacher and output, of the codec's real output on the
    measured rows; `total_bytes` of all that is left. `stage_rates` are rows a second of one worker, `rows_per_second`
    of all; `bottleneck` is the slowest stage. `seconds` includes the calibration, on one worker, but not the loading.
    """

    rows: int
    rows_left: int
    units: int
    unit_rows: int
    workers: int
    bytes_per_row: dict[str, dict[str, float]]
    total_bytes: float
    largest_shard_bytes: float
    peak_memory_bytes: float
    stage_rates: dict[str, float]
    bottleneck: str
    rows_per_second: float
    calibration_rows: int
    seconds: float
    gpu_hours: float


def estimate(config: ExtractConfig, observer: Observer) -> Estimate:
    """List the source, load the teachers, time a few batches; nothing is written.

    Raises:
        KpuError: whatever `extract` would refuse at its start; teachers that are complete are not loaded to be checked.
    """
    config = resolve_paths(config)
    existing = existing_plan(config.out)
    source = open_data(config.data, existing)
    if existing is not None:
        check_settings(existing, source, config)
    left = _rows_left(config, existing)
    missing = [name for name, rows in left.items() if rows] or list(left)
    loaded = config.model_copy(update={"teachers": {name: config.teachers[name] for name in missing}})
    shipped = {name: ship(teacher) for name, teacher in loaded.teachers.items()}
    threads = choose_threads(config.executor, existing, observer)
    observer.phase("load", ", ".join(shipped))
    with open_executor(WorkerSetup(loaded, shipped, source.spec, new_run_id()), threads, observer) as executor:
        specs = [description.spec for description in executor.call("describe")]
        check_teachers(config, specs, source.classes)
        observer.phase("plan", f"listing {redact(source.spec.root)}")
        sample, rows = _list(source, config, existing, observer)
        observer.phase("measure", f"{sample.num_rows} rows")
        measured = executor.call("measure", sample, WARM_BATCHES * config.executor.batch_size)
        workers, gpus = executor.workers, executor.gpus_per_worker

    unit_rows = existing.unit_rows if existing is not None else config.unit_rows
    if unit_rows == "auto":
        unit_rows = choose_unit_rows(rows, specs)
    unit = min(unit_rows, rows)
    left = {name: min(left[name], rows) for name in missing}
    sizes = measured.bytes_per_row
    seconds_per_row = _seconds_per_row(measured, overlapped=gpus > 0)
    calibrated = _calibration_rows(config, existing, specs, rows) if any(left.values()) else 0
    seconds = (max(left.values()) / workers + calibrated) * seconds_per_row
    return Estimate(
        rows=rows,
        rows_left=max(left.values()),
        units=-(-rows // unit_rows),
        unit_rows=unit_rows,
        workers=workers,
        bytes_per_row=sizes,
        total_bytes=sum(sum(sizes[name].values()) * left[name] for name in missing),
        largest_shard_bytes=unit * max(size for outputs in sizes.values() for size in outputs.values()),
        peak_memory_bytes=measured.resident_bytes + 2 * unit * sum(spec.held_bytes_per_row for spec in specs),
        stage_rates=measured.stage_rates,
        bottleneck=min(measured.stage_rates, key=lambda stage: measured.stage_rates[stage]),
        rows_per_second=workers / seconds_per_row,
        calibration_rows=calibrated,
        seconds=seconds,
        gpu_hours=seconds * workers * gpus / 3600,
    )


def _rows_left(config: ExtractConfig, existing: Plan | None) -> dict[str, int]:
    """By teacher, rows in units that it has not committed; of a cache that does not exist, more than it can have."""
    if existing is None:
        return dict.fromkeys(config.teachers, sys.maxsize)
    left = units_left(open_storage(config.out), existing, config.teachers)
    return {name: count_rows(existing, units) for name, units in left.items()}


def _list(
    source: ImageSource, config: ExtractConfig, existing: Plan | None, observer: Observer
) -> tuple[pa.Table, int]:
    """The rows to measure, from the head of the listing, and how many rows there are."""
    if existing is not None:
        check_listing(open_storage(config.out), existing, source, config, observer)
    wanted = (WARM_BATCHES + TIMED_BATCHES) * config.executor.batch_size
    head: list[pa.Table] = []
    rows = 0
    for table in listed_rows(source, config.views, config.seed):
        if rows < wanted:
            head.append(table.slice(0, wanted - rows))
        rows += table.num_rows
        if existing is not None and rows >= wanted:
            break
    if existing is None:
        tell_left_out(source, observer)
    return pa.concat_tables(head), rows if existing is None else existing.rows


def _calibration_rows(config: ExtractConfig, existing: Plan | None, specs: Sequence[TeacherSpec], rows: int) -> int:
    """Rows that the teachers which are not calibrated yet have to see before their first unit."""
    published = set(teacher_names(open_storage(config.out))) if existing is not None else set()
    if config.calibration_from is not None:
        return 0
    return sum({min(rows, wanted_rows(spec, config)) for spec in specs if spec.name not in published})


def _seconds_per_row(measured: Measurement, *, overlapped: bool) -> float:
    """Of one worker. Encoding runs beside the next unit's computing; on a CPU both want the same cores."""
    together = 1 / measured.rows_per_second
    if not overlapped or "encode" not in measured.stage_rates:
        return together
    encode = 1 / measured.stage_rates["encode"]
    return max(together - encode, encode)
