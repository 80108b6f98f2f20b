"""`--dry-run`: what an extraction would take, measured on a few batches of the real source with the real teachers."""

from collections.abc import Iterator

import pyarrow as pa

from cache.spec import Frozen
from pipeline.config import ExtractConfig
from pipeline.executors import open_executor
from pipeline.observers import Observer
from pipeline.paths import resolve_paths
from pipeline.planning import choose_threads, choose_unit_rows, listed_rows
from pipeline.runs import new_run_id
from pipeline.sources import open_source
from pipeline.teachers import ship
from pipeline.worker import WorkerSetup

WARM_BATCHES, TIMED_BATCHES = 1, 3


class Estimate(Frozen):
    """What a run would cost. Rates are of one worker; sizes are of the codec's real output on the measured rows."""

    rows: int
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
    seconds: float
    gpu_hours: float


def estimate(config: ExtractConfig, observer: Observer) -> Estimate:
    """List the source, load the teachers, time a few batches; nothing is written.

    Raises:
        KpuError: whatever `extract` would refuse at its start.
    """
    config = resolve_paths(config)
    source = open_source(config.data)
    shipped = {name: ship(teacher) for name, teacher in config.teachers.items()}
    threads = choose_threads(config.executor, None, observer)
    observer.phase("load", f"{len(shipped)} teachers")
    setup = WorkerSetup(config, shipped, source.spec, threads, new_run_id())
    with open_executor(config.executor, setup) as executor:
        specs = [description.spec for description in executor.call("describe")]
        observer.phase("plan", f"listing {source.spec.root}")
        wanted = (WARM_BATCHES + TIMED_BATCHES) * config.executor.batch_size
        sample, rows = _list(listed_rows(source, config), wanted)
        observer.phase("measure", f"{sample.num_rows} rows")
        measured = executor.call("measure", sample, WARM_BATCHES * config.executor.batch_size)
        workers, gpus = executor.workers, executor.gpus_per_worker

    unit_rows = config.unit_rows if config.unit_rows != "auto" else choose_unit_rows(rows, specs)
    sizes = [size for outputs in measured.bytes_per_row.values() for size in outputs.values()]
    rate = measured.rows_per_second * workers
    held = sum(spec.held_bytes_per_row for spec in specs)
    return Estimate(
        rows=rows,
        units=-(-rows // unit_rows),
        unit_rows=unit_rows,
        workers=workers,
        bytes_per_row=measured.bytes_per_row,
        total_bytes=sum(sizes) * rows,
        largest_shard_bytes=max(sizes) * min(unit_rows, rows),
        peak_memory_bytes=measured.resident_bytes + 2 * held * min(unit_rows, rows),
        stage_rates=measured.stage_rates,
        bottleneck=min(measured.stage_rates, key=lambda stage: measured.stage_rates[stage]),
        rows_per_second=rate,
        seconds=rows / rate,
        gpu_hours=rows / rate * workers * gpus / 3600,
    )


def _list(tables: Iterator[pa.Table], wanted: int) -> tuple[pa.Table, int]:
    """The first `wanted` rows, and how many there are."""
    head: list[pa.Table] = []
    rows = 0
    for table in tables:
        if rows < wanted:
            head.append(table.slice(0, wanted - rows))
        rows += table.num_rows
    return pa.concat_tables(head), rows
