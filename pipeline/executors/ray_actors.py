"""One worker per GPU share as a Ray actor. The only module that touches Ray."""

import logging
import os
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, chdir
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cache.errors import ConfigError, KpuError, TeacherError
from pipeline.config import ExecutorConfig
from pipeline.reports import Failure, Task, UnitReport
from pipeline.worker import Worker, WorkerSetup

IN_FLIGHT = 2
DEATHS_ALLOWED = 2
OBJECT_STORE_BYTES = 100 * 2**20  # only reports pass through it


class ActorWorker(Worker):
    """A worker inside an actor; two of its methods may run at once."""

    def ping(self) -> None:
        """Return once the constructor is through."""


@dataclass
class _Seat:
    """One place for an actor and the units it holds; `ready` is pending until the actor runs."""

    actor: Any
    ready: Any
    flying: dict[Any, Task] = field(default_factory=dict)


class _Queue:
    """Tasks that nobody holds: fresh ones, drawn lazily, and suspects that were lost with a worker."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._fresh = iter(tasks)
        self._next: Task | None = next(self._fresh, None)
        self.suspects: deque[Task] = deque()

    def __bool__(self) -> bool:
        return self._next is not None or bool(self.suspects)

    def fresh(self) -> Task | None:
        task = self._next
        if task is not None:
            self._next = next(self._fresh, None)
        return task


class RayExecutor:
    """Spreads units over actors; replaces actors that die; gives up on a unit that kills workers twice.

    Which of two units in flight killed a worker cannot be told, so both are tried again, each alone on a worker: the
    next death is then certain to be its own.
    """

    def __init__(self, config: ExecutorConfig, setup: WorkerSetup) -> None:
        self._config = config
        self._setup = setup
        self._cleanup = ExitStack()
        self._seats: list[_Seat] = []
        self.workers = 0
        self.gpus_per_worker = 0.0

    def __enter__(self) -> "RayExecutor":
        try:
            self._connect()
            self.gpus_per_worker = _gpus_per_worker(self._config)
            self._actor_class = ray.remote(ActorWorker).options(  # type: ignore[attr-defined]
                num_cpus=self._setup.threads, num_gpus=self.gpus_per_worker, max_concurrency=IN_FLIGHT, max_restarts=0
            )
            self.workers = _count_workers(self._config, self._setup.threads, self.gpus_per_worker)
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
        # Workers put the driver's directory first on their import path: a file cache.py there would replace our
        # package. An empty directory has none.
        empty = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="kpu-ray-"))
        self._cleanup.enter_context(chdir(empty))
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address = self._config.address
        local = address is None and "RAY_ADDRESS" not in os.environ
        extra: dict[str, Any] = {"object_store_memory": OBJECT_STORE_BYTES} if local else {}
        try:
            ray.init(
                address="local" if local else address,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **extra,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ConfigError(
                f"executor.address: cannot reach a Ray cluster at {address!r} ({error}); start one with `ray start "
                "--head`, give the right --ray-address, or leave it out to run on this machine"
            ) from None
        self._cleanup.callback(ray.shutdown)

    def _seat(self) -> _Seat:
        actor = self._actor_class.remote(self._setup)
        return _Seat(actor, actor.ping.remote())

    def call(self, method: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self._seats[0].actor, method).remote(*arguments))
        except RayTaskError as error:
            raise _unwrap(error) from None
        except RayActorError as error:
            raise _death(error) from None

    def run(self, tasks: Iterable[Task]) -> Iterator[UnitReport]:
        queue, deaths = _Queue(tasks), Counter[int]()
        while True:
            for seat in self._seats:
                self._fill(seat, queue, deaths)
            flying = {reference: seat for seat in self._seats for reference in seat.flying}
            if not flying and not queue:
                return
            arriving = {seat.ready: seat for seat in self._seats if seat.ready is not None}
            done, _ = ray.wait([*flying, *arriving], num_returns=1)
            seat = flying.get(done[0]) or arriving[done[0]]
            try:
                report = ray.get(done[0])
            except RayTaskError as error:
                raise _unwrap(error) from None
            except RayActorError as error:
                if done[0] is seat.ready:  # it never ran: the next one would not either
                    raise _death(error) from None
                yield from self._bury(seat, error, queue, deaths)
                continue
            if done[0] is seat.ready:
                seat.ready = None
            else:
                del seat.flying[done[0]]
                yield report

    def _fill(self, seat: _Seat, queue: _Queue, deaths: Counter[int]) -> None:
        """Give a worker that runs its next units: two at most, a suspect only alone."""
        if seat.ready is not None or any(deaths[task.unit] for task in seat.flying.values()):
            return
        if queue.suspects:
            if not seat.flying:
                self._submit(seat, queue.suspects.popleft())
            return  # this worker runs dry, so that a suspect can have it
        while len(seat.flying) < IN_FLIGHT and (task := queue.fresh()) is not None:
            self._submit(seat, task)

    def _submit(self, seat: _Seat, task: Task) -> None:
        seat.flying[seat.actor.extract.remote(task)] = task

    def _bury(self, seat: _Seat, error: RayActorError, queue: _Queue, deaths: Counter[int]) -> Iterator[UnitReport]:
        """Replace a dead actor; its units are tried again or reported."""
        lost = list(seat.flying.values())
        self._seats[self._seats.index(seat)] = self._seat()
        for task in lost:
            deaths[task.unit] += 1
            if deaths[task.unit] < DEATHS_ALLOWED:
                queue.suspects.append(task)
                continue
            reason = f"its worker died {DEATHS_ALLOWED} times while holding this unit ({_first_line(error)})"
            yield UnitReport(task, 0, 0, 0, {}, (Failure(task.unit, None, reason),))


def _gpus_per_worker(config: ExecutorConfig) -> float:
    if config.gpus_per_worker != "auto":
        return config.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def _count_workers(config: ExecutorConfig, threads: int, gpus: float) -> int:
    """As many workers as the cluster can hold, or the number asked for if it fits.

    Raises:
        ConfigError: the cluster has no room for one worker, or for as many as asked for.
    """
    resources = ray.cluster_resources()
    room = int(resources.get("CPU", 0) // threads)
    if gpus:
        room = min(room, int(resources.get("GPU", 0) / gpus + 1e-9))
    wanted = room if config.workers == "auto" else config.workers
    if room < max(wanted, 1):
        raise ConfigError(
            f"executor.workers: {max(wanted, 1)} workers of {threads} CPU threads and {gpus:g} GPUs do not fit the "
            f"cluster, which has {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs; ask for fewer "
            "workers, threads or gpus_per_worker"
        )
    return wanted


def _unwrap(error: RayTaskError) -> BaseException:
    cause = error.cause
    return cause if isinstance(cause, KpuError) else error


def _death(error: RayActorError) -> KpuError:
    """Why a worker died before it answered: most often its constructor raised."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KpuError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return TeacherError(f"a Ray worker died while it loaded or calibrated the teachers: {error}")


def _first_line(error: RayError) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
