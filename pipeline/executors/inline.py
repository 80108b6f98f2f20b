"""One worker in this process."""

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from types import TracebackType
from typing import Any

import torch

from kpu.util.cores import usable_cores
from pipeline.run.observers import TELL_EVERY_SECONDS, Observer, Progress
from pipeline.run.reports import Task, UnitReport
from pipeline.worker.device import choose_device
from pipeline.worker.worker import Worker, WorkerSetup

IN_FLIGHT = 2


class InlineExecutor:
    """Runs one worker here: a unit computes while the one before it is encoded and written."""

    workers = 1

    def __init__(self, setup: WorkerSetup, threads: int | None, observer: Observer) -> None:
        self.threads = threads or usable_cores()
        self.gpus_per_worker = 0.0 if choose_device() == "cpu" else 1.0
        if (gpus := torch.cuda.device_count()) > 1:
            observer.warn(f"executor.kind: inline uses one of the {gpus} GPUs here; --executor ray uses all")
        self._worker = Worker(setup, self.threads)

    def __enter__(self) -> "InlineExecutor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.close()

    def call(self, method: str, *arguments: Any, progress: Progress | None = None) -> Any:
        work = partial(getattr(self._worker, method), *arguments)
        if progress is None:
            return work()
        with ThreadPoolExecutor(1, thread_name_prefix="call") as thread:
            result = thread.submit(work)
            try:
                while not wait([result], TELL_EVERY_SECONDS).done:
                    progress(self._worker.progress())
            except BaseException:
                self._worker.stop()
                raise
        return result.result()

    def run(self, tasks: Iterable[Task]) -> Iterator[UnitReport]:
        waiting = iter(tasks)
        with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="unit") as threads:
            flying: set[Future[UnitReport]] = set()
            try:
                while True:
                    while len(flying) < IN_FLIGHT and (task := next(waiting, None)) is not None:
                        flying.add(threads.submit(self._worker.extract, task))
                    if not flying:
                        return
                    done, flying = wait(flying, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            except BaseException:
                self._worker.stop()
                raise
