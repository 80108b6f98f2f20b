"""A worker inside a Ray actor. What goes wrong in it says on which machine: others may have what this one lacks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from socket import gethostname

import numpy as np
import pyarrow as pa

from kpu.errors import KpuError, on_machine
from kpu.format.statistics import Statistics
from pipeline.run.reports import Task, UnitReport
from pipeline.worker.measure import Measurement
from pipeline.worker.worker import TeacherDescription, Worker, WorkerSetup


class ActorWorker:
    """A `Worker`, loaded after its actor has a place, so that the driver can tell a slow start from a full cluster.

    Two of its methods may run at once.
    """

    def __init__(self, setup: WorkerSetup, threads: int) -> None:
        self._setup = setup
        self._threads = threads

    def ping(self) -> None:
        """Return once the actor has a place."""

    def load(self) -> None:
        """Load the teachers, before any other method but `ping`."""
        with _machine_named():
            self._worker = Worker(self._setup, self._threads)

    def describe(self) -> list[TeacherDescription]:
        with _machine_named():
            return self._worker.describe()

    def calibrate(self, names: Sequence[str], rows: np.ndarray) -> dict[str, dict[str, Statistics]]:
        with _machine_named():
            return self._worker.calibrate(names, rows)

    def progress(self) -> int:
        return self._worker.progress()

    def measure(self, table: pa.Table, warm_rows: int) -> Measurement:
        with _machine_named():
            return self._worker.measure(table, warm_rows)

    def extract(self, task: Task) -> UnitReport:
        with _machine_named():
            report = self._worker.extract(task)
        failures = (replace(failure, reason=on_machine(failure.reason, gethostname())) for failure in report.failures)
        return replace(report, failures=tuple(failures))


@contextmanager
def _machine_named() -> Iterator[None]:
    try:
        yield
    except KpuError as error:
        error.machine = gethostname()
        raise
