"""One worker per GPU share as a Ray actor. The only module that touches Ray."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from time import monotonic
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from kpu.errors import ConfigError, IncompleteError, KpuError
from kpu.util.cores import usable_cores
from pipeline.executors.actor import ActorWorker
from pipeline.executors.addresses import check_listening, not_reached
from pipeline.executors.room import (
    Nodes,
    count_by_gpus,
    count_room,
    count_workers,
    gpus_per_worker,
    held_by_others,
    threads_per_worker,
)
from pipeline.executors.seats import Seat, TaskQueue
from pipeline.executors.signals import stop_signals_kept
from pipeline.run.observers import TELL_EVERY_SECONDS, Observer, Progress
from pipeline.run.reports import Task, UnitFailure, UnitReport
from pipeline.worker.worker import WorkerSetup

IN_FLIGHT = 2
DEATHS_ALLOWED = 2
OBJECT_STORE_BYTES = 100 * 2**20  # only reports pass through it
LOOK_SECONDS = 10.0  # how often the cluster is looked at while no worker runs
LOOKS_ALLOWED = 6  # in which no worker gets a place: the first is placed before its process has loaded its modules
PATIENCE_SECONDS = 600.0  # how long a cluster may be without room for any worker
WORKERS = {"worker_process_setup_hook": "kpu.own_packages.prepare_ray_worker"}
DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError)  # the second is Ray's own killing before the memory is full
ADVICE = "most often the memory was full: use fewer workers or a smaller executor.batch_size"


class RayExecutor:
    """Spreads units over actors; replaces actors that die; gives up on a unit that kills workers twice.

    Which of two units in flight killed a worker cannot be told, so both are tried again, each alone on a worker: the
    next death is then certain to be its own.
    """

    def __init__(self, setup: WorkerSetup, threads: int | None, observer: Observer) -> None:
        self._config = setup.config.executor
        self._setup = setup
        self._planned_threads = threads
        self._observer = observer
        self._cleanup = ExitStack()
        self._seats: list[Seat] = []
        self._no_capacity_since: float | None = None
        self._looks = 0  # at a cluster that has room, in vain
        self.workers = self.threads = 0
        self.gpus_per_worker = 0.0

    def __enter__(self) -> "RayExecutor":
        try:
            self._connect()
            nodes = _living_nodes()
            self.gpus_per_worker = gpus_per_worker(nodes, self._config)
            self.threads = self._planned_threads or threads_per_worker(nodes, self._config, self.gpus_per_worker)
            actor_class: Any = ray.remote(ActorWorker)
            self._actor_class = actor_class.options(
                num_cpus=self.threads, num_gpus=self.gpus_per_worker, max_concurrency=IN_FLIGHT, max_restarts=0
            )
            self.workers = count_workers(nodes, self._config, self.threads, self.gpus_per_worker)
            wanted = count_by_gpus(nodes, self.gpus_per_worker)
            if self._config.workers == "auto" and self.workers < wanted:
                self._observer.warn(
                    f"executor.threads: the GPUs are enough for {wanted} workers, the CPUs for {self.workers} of "
                    f"{self.threads} threads each; use fewer threads"
                )
            self._seats = [self._seat() for _ in range(self.workers)]
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def _connect(self) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address = self._config.address or os.environ.get("RAY_ADDRESS")
        local = address is None
        extra: dict[str, Any] = {}
        if local:
            extra = {"object_store_memory": OBJECT_STORE_BYTES, "num_cpus": usable_cores()}
        self._cleanup.callback(ray.shutdown)
        try:
            if address is not None:
                check_listening(address)
            with stop_signals_kept():
                ray.init(
                    address="local" if local else address,
                    include_dashboard=False if local else None,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env=WORKERS,
                    **extra,
                )
        except Exception as error:  # Ray raises a plain one where its processes take too long to start
            raise ConfigError(not_reached(address, error)) from None

    def _seat(self, attempt: int = 1) -> Seat:
        actor = self._actor_class.remote(self._setup, self.threads)
        return Seat(actor, actor.ping.remote(), actor.load.remote(), attempt)

    def call(self, method: str, *arguments: Any, progress: Progress | None = None) -> Any:
        deaths = 0
        while True:
            seat = self._first_to_run()
            try:
                result = getattr(seat.actor, method).remote(*arguments)
                while progress is not None and not ray.wait([result], timeout=TELL_EVERY_SECONDS)[0]:
                    progress(ray.get(seat.actor.progress.remote()))
                return ray.get(result)
            except DEATHS as error:
                deaths += 1
                if deaths == DEATHS_ALLOWED:
                    raise _loading_kills(error) from None
                self._replace(seat, error)
            except RayError as error:
                raise _unwrap(error) from None

    def _first_to_run(self) -> Seat:
        """Wait until a worker runs."""
        while True:
            for seat in self._seats:
                if seat.ready is None:
                    return seat
            self._await({})

    def _await(self, flying: dict[Any, Seat]) -> tuple[Seat, Any] | None:
        """Wait until a unit of `flying` is done, or a worker runs or died before it could; only a unit is returned.

        Raises:
            IncompleteError: no worker runs, and the cluster has had no room for one for too long.
        """
        arriving = {seat.ready: seat for seat in self._seats if seat.ready is not None}
        done, _ = ray.wait([*flying, *arriving], num_returns=1, timeout=None if flying else LOOK_SECONDS)
        if not done:
            self._look_for_room()
            return None
        if done[0] in flying:
            return flying[done[0]], done[0]
        seat, self._no_capacity_since = arriving[done[0]], None
        try:
            ray.get(done[0])
            seat.ready = None
        except DEATHS as error:
            self._replace(seat, error)
        except RayError as error:
            raise _unwrap(error) from None
        return None

    def _look_for_room(self) -> None:
        """Warn when actors cannot be scheduled; give up after `PATIENCE_SECONDS` without room for any."""
        nodes = _living_nodes()
        if count_room(nodes, self.threads, self.gpus_per_worker):
            self._no_capacity_since = None
            self._look_for_others(nodes)
            return
        needed = f"a worker of {self.threads} CPU threads and {self.gpus_per_worker:g} GPUs"
        if self._no_capacity_since is None:
            self._no_capacity_since = monotonic()
            self._observer.warn(
                f"no node of the cluster has room for {needed} any more; waiting {PATIENCE_SECONDS:g} s for one"
            )
        elif monotonic() - self._no_capacity_since > PATIENCE_SECONDS:
            raise IncompleteError(
                f"no node of the cluster has had room for {needed} for {PATIENCE_SECONDS:g} s; committed units are "
                "safe, and the same command resumes once nodes are back"
            )

    def _look_for_others(self, nodes: Nodes) -> None:
        """Say once that others hold what every worker waits for."""
        placed, _ = ray.wait([seat.placed for seat in self._seats], num_returns=1, timeout=0)
        self._looks = 0 if placed else self._looks + 1
        if self._looks == LOOKS_ALLOWED:
            held = held_by_others(nodes, ray.available_resources(), self.threads, self.gpus_per_worker)
            if held is not None:
                self._observer.warn(held)

    def run(self, tasks: Iterable[Task]) -> Iterator[UnitReport]:
        queue, deaths = TaskQueue(tasks), Counter[int]()
        while True:
            for seat in self._seats:
                self._fill(seat, queue, deaths)
            flying = {reference: seat for seat in self._seats for reference in seat.flying}
            if not flying and not queue:
                return
            landed = self._await(flying)
            if landed is None:
                continue
            seat, done = landed
            try:
                report = ray.get(done)
            except DEATHS as error:
                self._replace(seat, error)
                yield from _last_reports(seat, queue, deaths)
            except RayError as error:
                raise _unwrap(error) from None
            else:
                del seat.flying[done]
                yield report

    def _fill(self, seat: Seat, queue: TaskQueue, deaths: Counter[int]) -> None:
        """Give a worker that runs its next units: two at most, a suspect only alone."""
        if seat.ready is not None or any(deaths[task.unit] for task in seat.flying.values()):
            return
        if queue.suspects:
            if not seat.flying:
                self._submit(seat, queue.suspects.popleft())
            return  # this worker runs dry, so that a suspect can have it
        while len(seat.flying) < IN_FLIGHT and (task := queue.fresh()) is not None:
            self._submit(seat, task)

    def _submit(self, seat: Seat, task: Task) -> None:
        seat.flying[seat.actor.extract.remote(task)] = task

    def _replace(self, seat: Seat, error: RayError) -> None:
        """Put a new actor in the place of a dead one.

        Raises:
            KpuError: the constructor raised it, so the next actor's would too.
            IncompleteError: actors in this place keep dying before they run.
        """
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise _constructor_error(error) from None
        attempt = 1 if seat.ready is None else seat.attempt + 1
        if attempt > DEATHS_ALLOWED:
            raise _loading_kills(error) from None
        ray.kill(seat.actor)  # where it is only out of reach, it must not go on beside the new one
        self._seats[self._seats.index(seat)] = self._seat(attempt)


def _last_reports(seat: Seat, queue: TaskQueue, deaths: Counter[int]) -> Iterator[UnitReport]:
    """What becomes of the units of a dead worker: done before it died, tried again, or failed."""
    for reference, task in seat.flying.items():
        try:
            yield ray.get(reference)
        except DEATHS as error:
            deaths[task.unit] += 1
            if deaths[task.unit] < DEATHS_ALLOWED:
                queue.suspects.append(task)
                continue
            reason = f"its worker died {DEATHS_ALLOWED} times while it held this unit ({_detail(error)}); {ADVICE}"
            yield UnitReport(task, 0, 0, 0, {}, (UnitFailure(task.unit, None, reason),))
        except RayError as error:
            raise _unwrap(error) from None


def _living_nodes() -> Nodes:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _loading_kills(error: RayError) -> IncompleteError:
    return IncompleteError(
        f"a Ray worker died {DEATHS_ALLOWED} times while it loaded or calibrated the teachers ({_detail(error)}); "
        f"{ADVICE}"
    )


def _unwrap(error: RayError) -> BaseException:
    """What an actor raised, or what went wrong with Ray itself."""
    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, KpuError) else error
    return IncompleteError(f"Ray failed: {_detail(error)}; committed units are safe, the same command resumes")


def _constructor_error(error: RayActorError) -> BaseException:
    """Ray keeps what a constructor raised only as an argument of its own error."""
    wrapped = next((value for value in error.args if isinstance(value, RayTaskError)), None)
    return error if wrapped is None else _unwrap(wrapped)


def _detail(error: RayError) -> str:
    """The telling sentence of Ray's message."""
    text = str(error)
    _, mark, detail = text.partition("Worker exit detail: ")
    return (detail if mark else text.strip().partition("\n")[0]).partition(" Some common causes")[0].strip()
