"""Who is told how an extraction goes."""

from collections.abc import Callable
from typing import Final, Protocol

from pipeline.run.records import RunSummary
from pipeline.run.reports import UnitReport

Progress = Callable[[int], None]
"""Told of rows so far."""

TELL_EVERY_SECONDS: Final = 0.5


class Observer(Protocol):
    """Receives what happens, in order, on the driver's main thread."""

    def phase(self, name: str, detail: str) -> None:
        """One of load, plan, calibrate begins."""

    def progress(self, phase: str, total: int, done: int) -> None:
        """Within a phase: `done` of `total` rows."""

    def warn(self, message: str) -> None:
        """Something that the user should know and that does not stop the run."""

    def begin(self, *, total: int, pending: int, workers: int) -> None:
        """Extraction begins: `pending` of `total` rows are left to do."""

    def report(self, report: UnitReport) -> None:
        """A unit is done, or failed."""

    def end(self, summary: RunSummary) -> None:
        """The run is over."""


class Silent:
    """Tells nobody."""

    def phase(self, name: str, detail: str) -> None: ...

    def progress(self, phase: str, total: int, done: int) -> None: ...

    def warn(self, message: str) -> None: ...

    def begin(self, *, total: int, pending: int, workers: int) -> None: ...

    def report(self, report: UnitReport) -> None: ...

    def end(self, summary: RunSummary) -> None: ...
