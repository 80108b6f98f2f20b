"""How an extraction looks: a live display on a terminal, plain lines elsewhere."""

import time
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cli.units import human_bytes, human_seconds
from pipeline.reports import UnitReport
from pipeline.runs import RunSummary

PLAIN_EVERY_SECONDS = 10.0
RATE_WINDOW = 32


class Meter:
    """Rows a second over the last units, the share of each stage, and the time left."""

    def __init__(self, pending: int) -> None:
        self.pending = pending
        self.rows = self.failed = self.masked = 0
        self._stages: dict[str, float] = {}
        self._points: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=RATE_WINDOW)

    def add(self, report: UnitReport) -> None:
        self.rows += report.rows
        self.masked += report.masked
        self.failed += bool(report.failures)
        for stage, seconds in report.seconds.items():
            self._stages[stage] = self._stages.get(stage, 0.0) + seconds
        self._points.append((time.monotonic(), self.rows))

    @property
    def rate(self) -> float:
        (t0, r0), (t1, r1) = self._points[0], self._points[-1]
        return (r1 - r0) / (t1 - t0) if t1 > t0 else 0.0

    @property
    def shares(self) -> str:
        total = sum(self._stages.values()) or 1.0
        return " ".join(f"{stage} {seconds / total:.0%}" for stage, seconds in self._stages.items())

    def line(self) -> str:
        left = (self.pending - self.rows) / self.rate if self.rate else 0.0
        trouble = f" | {self.failed} units failed" if self.failed else ""
        masked = f" | {self.masked} masked" if self.masked else ""
        return f"{self.rate:,.0f} rows/s | {self.shares} | left {human_seconds(left)}{masked}{trouble}"


class PlainObserver:
    """One line a phase, and one every ten seconds of extraction."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._meter = Meter(0)
        self._last = time.monotonic()

    def __enter__(self) -> "PlainObserver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def phase(self, name: str, detail: str) -> None:
        self._console.print(f"{name}: {detail}" if detail else name, markup=False, highlight=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        self._console.print(f"warning: {message}", markup=False, highlight=False, soft_wrap=True)

    def begin(self, *, total: int, pending: int, workers: int) -> None:
        self._meter = Meter(pending)
        self._last = time.monotonic()
        self.phase("extract", f"{pending:,} of {total:,} rows to do, {workers} worker{'s' if workers > 1 else ''}")

    def report(self, report: UnitReport) -> None:
        self._meter.add(report)
        for failure in report.failures:
            teacher = f" of teacher {failure.teacher}" if failure.teacher else ""
            self.warn(f"unit {failure.unit}{teacher} failed: {failure.reason}")
        if time.monotonic() - self._last >= PLAIN_EVERY_SECONDS:
            self._last = time.monotonic()
            self.phase("extract", f"{self._meter.rows:,}/{self._meter.pending:,} rows | {self._meter.line()}")

    def end(self, summary: RunSummary) -> None:
        startup = f"{summary.rows:,} rows in {human_seconds(summary.seconds)}, {summary.rows_per_second:,.0f} rows/s"
        self.phase("done" if summary.complete else "stopped", f"{startup}, {human_bytes(summary.bytes)} written")


class LiveObserver(PlainObserver):
    """A progress bar with rate, share of the stages and time left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bar = Progress(
            TextColumn("extract"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[line]}"), console=console,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, *, total: int, pending: int, workers: int) -> None:
        super().begin(total=total, pending=pending, workers=workers)
        self._task = self._bar.add_task("extract", total=pending, line="")
        self._bar.start()

    def report(self, report: UnitReport) -> None:
        self._last = time.monotonic()  # the bar stands in for the plain lines
        super().report(report)
        if self._task is not None:
            self._bar.update(self._task, completed=self._meter.rows, line=self._meter.line())

    def end(self, summary: RunSummary) -> None:
        self._bar.stop()
        super().end(summary)


def open_observer(console: Console) -> LiveObserver | PlainObserver:
    """The live display where `console` is a terminal, plain lines elsewhere."""
    return LiveObserver(console) if console.is_terminal else PlainObserver(console)
