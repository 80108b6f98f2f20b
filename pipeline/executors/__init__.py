"""Who runs the workers: this process, or Ray actors. Both run the same `Worker` and give the same bytes."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pipeline.run.observers import Observer, Progress
from pipeline.run.reports import Task, UnitReport
from pipeline.worker.worker import WorkerSetup


class Executor(Protocol):
    """Runs a worker's methods; `threads` is CPU threads of one worker."""

    workers: int
    threads: int
    gpus_per_worker: float

    def call(self, method: str, *arguments: Any, progress: Progress | None = None) -> Any:
        """Run one method on one worker and wait for its result; `progress` hears now and then of its rows so far."""

    def run(self, tasks: Iterable[Task]) -> Iterator[UnitReport]:
        """Run `Worker.extract` over `tasks`, at most two units in flight per worker; yield reports as they come.

        `tasks` is drawn lazily, when a worker has room. Closing the iterator gives up what is in flight; a unit whose
        features are computed may still be committed.
        """


def open_executor(setup: WorkerSetup, threads: int | None, observer: Observer) -> AbstractContextManager[Executor]:
    """The executor that the configuration names, its workers' teachers loaded; `threads` None: as many as fit."""
    if setup.config.executor.kind == "ray":
        from pipeline.executors.ray_actors import RayExecutor  # Ray takes a second to import

        return RayExecutor(setup, threads, observer)
    from pipeline.executors.inline import InlineExecutor

    return InlineExecutor(setup, threads, observer)
