"""Who runs the workers: this process, or Ray actors. Both run the same `Worker` and give the same bytes."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pipeline.config import ExecutorConfig
from pipeline.reports import Task, UnitReport
from pipeline.worker import WorkerSetup


class Executor(Protocol):
    """Runs a worker's methods."""

    workers: int
    gpus_per_worker: float

    def call(self, method: str, *arguments: Any) -> Any:
        """Run one method on one worker and wait for its result."""

    def run(self, tasks: Iterable[Task]) -> Iterator[UnitReport]:
        """Run `Worker.extract` over `tasks`, at most two units in flight per worker; yield reports as they come.

        `tasks` is drawn lazily, when a worker has room. Closing the iterator gives up what is in flight; a unit whose
        features are computed may still be committed.
        """


def open_executor(config: ExecutorConfig, setup: WorkerSetup) -> AbstractContextManager[Executor]:
    """The executor that `config` names, its workers' teachers loaded."""
    if config.kind == "ray":
        from pipeline.executors.ray_actors import RayExecutor  # Ray takes a second to import

        return RayExecutor(config, setup)
    from pipeline.executors.inline import InlineExecutor

    return InlineExecutor(setup)
