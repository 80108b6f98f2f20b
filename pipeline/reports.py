"""What workers tell the driver."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from time import perf_counter

STAGES = ("read", "decode", "forward", "quantise", "encode", "publish")


@dataclass(frozen=True)
class Task:
    """One unit, for the teachers that have not committed it yet."""

    unit: int
    teachers: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    """Why a unit did not commit; `teacher` is None where it concerns all of them."""

    unit: int
    teacher: str | None
    reason: str


@dataclass(frozen=True)
class UnitReport:
    """One finished task. `seconds` is busy time by stage; stages overlap, so the sum may exceed the wall time."""

    task: Task
    rows: int
    masked: int
    bytes: int
    seconds: dict[str, float]
    failures: tuple[Failure, ...] = ()


@dataclass
class Stopwatch:
    """Adds up busy seconds by stage, from several threads."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _lock: Lock = field(default_factory=Lock, repr=False)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            elapsed = perf_counter() - start
            with self._lock:
                self.seconds[stage] += elapsed
