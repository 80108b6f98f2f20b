"""What workers tell the driver."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock, local
from time import perf_counter

STAGES = ("read", "decode", "forward", "quantise", "encode", "publish")


@dataclass(frozen=True)
class Task:
    """One unit, for the teachers that have not committed it yet."""

    unit: int
    teachers: tuple[str, ...]


@dataclass(frozen=True)
class UnitFailure:
    """Why a unit did not commit; `teacher` is None if it concerns all of them."""

    unit: int
    teacher: str | None
    reason: str


@dataclass(frozen=True)
class UnitReport:
    """One finished task. `seconds` is busy time by stage; stages overlap, so the sum may exceed the wall time.

    `masked` rows have no image that can be decoded; `reasons` counts them by why. By teacher that was committed,
    `saturated` is how many values are beyond the range of the codec, and of how many, and `nonfinite` how many other
    rows are masked for this teacher alone, which gave NaN or infinity for them.
    """

    task: Task
    rows: int
    masked: int
    bytes: int
    seconds: dict[str, float]
    failures: tuple[UnitFailure, ...] = ()
    saturated: dict[str, tuple[int, int]] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)


class Stopwatch:
    """Adds up busy seconds by stage, from several threads. A stage inside another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._lock = Lock()
        self._inner = local()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        outer = getattr(self._inner, "seconds", 0.0)
        self._inner.seconds = 0.0
        start = perf_counter()
        try:
            yield
        finally:
            elapsed = perf_counter() - start
            with self._lock:
                self.seconds[stage] += elapsed - self._inner.seconds
            self._inner.seconds = outer + elapsed
