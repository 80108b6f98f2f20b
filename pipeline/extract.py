"""`kpu-cache extract`, from top to bottom: load, plan, calibrate, extract, report.

Whatever was done before is found in the cache and not done again, so the same call resumes.
"""

import os
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from kpu.errors import CorruptError, FullDiskError, IncompleteError, LinkError, StorageError, StorageFault
from kpu.format.plan import Plan
from kpu.records.samples import Samples
from kpu.records.teachers import teacher_folders
from kpu.records.units import Mask, count_rows, lost_images, units_left
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.storage.leases import collect_garbage, lease
from kpu.storage.open import open_storage
from kpu.storage.places import redact
from kpu.trust.code import places_of
from kpu.trust.list import Trust, remember
from kpu.util.failpoints import failpoint
from pipeline.config import ExtractConfig, as_config
from pipeline.paths import resolve_paths
from pipeline.planning import check_settings, choose_threads, open_data, plan_cache
from pipeline.recorded import unfinished
from pipeline.run.observers import Observer, Silent
from pipeline.run.records import Run, RunSummary, new_run_id
from pipeline.run.reports import Task
from pipeline.target import cleanup_on_failure, existing_plan

if TYPE_CHECKING:
    from pipeline.executors import Executor

FAILURES_IN_A_ROW = 20


def extract(
    config: ExtractConfig | Mapping[str, Any] | str | os.PathLike[str],
    observer: Observer | None = None,
    units: frozenset[int] | None = None,
    *,
    trust: Trust | None = None,
) -> RunSummary:
    """Bring the cache at `config.out` to completion for the configured teachers.

    Args:
        config: what to extract: a configuration, its plain values, or the path of a YAML file.
        observer: is told how it goes.
        units: restricts the work to some units.
        trust: which code may run, where a file and not the user named the teachers; None if the user did: then their
            code is trusted from now on.

    Returns:
        The summary, which says whether every unit is committed.

    Raises:
        KpuError: the configuration, the source, a teacher or the cache's location does not allow it; nothing that was
            committed is touched.
    """
    observer = observer or Silent()
    config = resolve_paths(as_config(config))
    run_id, begun = new_run_id(), perf_counter()

    existing = existing_plan(config.out)
    source = open_data(config.data, existing)
    if existing is not None:
        check_settings(existing, source, config)
    named = {} if trust is not None else places_of(*(teacher.model for teacher in config.teachers.values()))
    needed = unfinished(config, existing)
    done = [name for name in config.teachers if name not in needed.teachers]
    observer.phase("load", ", ".join(needed.teachers) + (f"; complete already: {', '.join(done)}" if done else ""))
    config = needed
    # These load torch, which takes seconds; what is refused above does not wait for it.
    from pipeline.calibration import calibrate_teachers
    from pipeline.checks import check_teachers, warn_of_heads, warn_of_labels, warn_of_order
    from pipeline.executors import open_executor
    from pipeline.teachers import ship
    from pipeline.worker.worker import WorkerSetup

    shipped = {name: ship(teacher, trust) for name, teacher in config.teachers.items()}
    threads = choose_threads(config.executor, existing, observer)

    setup = WorkerSetup(config, shipped, source.spec, run_id)
    with cleanup_on_failure(config.out) as created, open_executor(setup, threads, observer) as executor:
        teachers = executor.call("describe")
        check_teachers(config, [teacher.spec for teacher in teachers], source.classes)
        ran = {key: place for teacher in teachers for key, place in teacher.code.items()}
        if (unkept := remember({**named, **ran})) is not None:
            observer.warn(unkept)
        loaded = perf_counter()

        storage = open_storage(config.out, create=True, created=created)
        with lease(storage, run_id):
            observer.phase("plan", f"listing {redact(source.spec.root)}")
            plan = plan_cache(storage, source, config, [t.spec for t in teachers], executor.threads, run_id, observer)
            warn_of_order(source, observer)
            warn_of_heads([t.spec for t in teachers], observer)
            warn_of_labels([t.spec for t in teachers], plan, Samples(storage, plan), observer)
            planned = perf_counter()
            collect_garbage(storage, quarantine=False)

            with Run(storage, run_id, config, source.left_out) as run:
                calibrate_teachers(storage, plan, config, teachers, executor, run_id, observer)
                startup = {"load": loaded - begun, "plan": planned - loaded, "calibrate": perf_counter() - planned}
                run.started(plan, startup)

                try:
                    _work_off(storage, plan, config, executor, run, observer, units)
                except (LinkError, FullDiskError, StorageFault):
                    raise
                except StorageError as error:  # the location was sound when the run began
                    raise StorageFault(str(error)) from error
                failpoint("run.finished")
                summary = run.finish(remaining_tasks(units_left(storage, plan, config.teachers)))
    collect_garbage(storage, quarantine=False)
    observer.end(summary)
    return summary


def _work_off(
    storage: Storage,
    plan: Plan,
    config: ExtractConfig,
    executor: "Executor",
    run: Run,
    observer: Observer,
    units: frozenset[int] | None,
) -> None:
    """Run every pending unit; stop early where nothing succeeds any more."""
    missing = units_left(storage, plan, teacher_folders(storage))
    _check_images(storage, plan, missing)
    left = {name: missing[name] for name in config.teachers}
    if units is not None:
        wanted = np.isin(np.arange(plan.units), list(units))
        left = {name: each & wanted for name, each in left.items()}
    pending = count_rows(plan, np.logical_or.reduce(list(left.values())))
    observer.begin(total=plan.rows, pending=pending, workers=executor.workers)
    in_a_row = 0
    for report in executor.run(remaining_tasks(left)):
        if not report.task.teachers:
            continue  # another driver has committed it since the listing
        run.record(report)
        observer.report(report)
        in_a_row = in_a_row + 1 if report.failures else 0
        if in_a_row == FAILURES_IN_A_ROW:
            raise IncompleteError(
                f"stopped: {in_a_row} units in a row failed, the last one with: {report.failures[-1].reason}"
            )


def _check_images(storage: Storage, plan: Plan, missing: Mapping[str, Mask]) -> None:
    for unit, teacher in sorted(lost_images(storage, plan, {name: ~each for name, each in missing.items()}).items()):
        raise CorruptError(
            paths.commit(paths.IMAGES, unit),
            f"is missing, though teacher {teacher!r} committed the unit; `kpu-cache repair {storage.url}` "
            "withdraws it, for this command to extract it again",
            unit=unit,
        )


def remaining_tasks(left: Mapping[str, Mask]) -> Iterator[Task]:
    """Tasks that are left, in order of units; `left` are, by teacher, the units that it has not committed."""
    for unit in np.flatnonzero(np.logical_or.reduce(list(left.values()))).tolist():
        yield Task(unit, tuple(name for name, missing in left.items() if missing[unit]))
