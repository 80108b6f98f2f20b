"""How an extraction looks: a live display on a terminal, plain lines elsewhere."""

import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cli.output import PLAIN_EVERY_SECONDS
from cli.output import console as open_console
from cli.views.units import human_bytes, human_seconds, plural
from kpu.storage.places import redact
from pipeline.run.records import RunSummary
from pipeline.run.reports import UnitReport

RATE_WINDOW = 32
BAR_WIDTH = 30


class Meter:
    """Rows a second over the last units, the share of each stage in the busy time, and the time left."""

    def __init__(self, pending: int) -> None:
        self.pending = pending
        self.rows = self.failed = self.masked = 0
        self._stages: dict[str, float] = {}
        self._points: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=RATE_WINDOW)

    def add(self, report: UnitReport) -> None:
        self.rows += report.rows
        self.masked += report.masked + sum(report.nonfinite.values())
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
        return ", ".join(f"{stage} {seconds / total:.0%}" for stage, seconds in self._stages.items() if seconds)

    @property
    def counts(self) -> str:
        """Rows done and to do, rate and time left, and what went wrong so far."""
        left = f"{human_seconds((self.pending - self.rows) / self.rate)} left" if self.rate else "starting"
        trouble = [f"{self.masked:,} masked"] * bool(self.masked)
        trouble += [f"{plural(self.failed, 'unit')} failed"] * bool(self.failed)
        return ", ".join([f"{self.rows:,}/{self.pending:,} rows", f"{self.rate:,.0f} rows/s", left, *trouble])


class PlainObserver:
    """One line a phase, and one every ten seconds of extraction. Warnings go to standard error."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._meter = Meter(0)
        self._begun = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def phase(self, name: str, detail: str) -> None:
        self._begun = self._last = time.monotonic()
        if detail:
            self._say(f"{name}: {detail}")

    def progress(self, phase: str, total: int, done: int) -> None:
        if time.monotonic() - self._last >= PLAIN_EVERY_SECONDS:
            self._last = time.monotonic()
            self._say(f"{phase}: {self._count(total, done)}")

    def _count(self, total: int, done: int) -> str:
        passed = time.monotonic() - self._begun
        left = f", {human_seconds(passed * (total - done) / done)} left" if done else ""
        return f"{done:,}/{total:,} rows{left}"

    def warn(self, message: str) -> None:
        errors = self._console if self._console.is_terminal else open_console(stderr=True)
        errors.print(f"warning: {redact(message)}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    def begin(self, *, total: int, pending: int, workers: int) -> None:
        self._meter = Meter(pending)
        self._last = time.monotonic()
        done = f", {total - pending:,} are there already" if 0 < pending < total else ""
        work = f"{pending:,} of {total:,} rows on {plural(workers, 'worker')}{done}"
        self._say(f"extract: {work if pending else 'nothing is left to do'}")

    def report(self, report: UnitReport) -> None:
        self._meter.add(report)
        for failure in report.failures:
            teacher = f", teacher {failure.teacher}," if failure.teacher else ""
            self.warn(f"unit {failure.unit}{teacher} failed: {failure.reason}")
        if time.monotonic() - self._last >= PLAIN_EVERY_SECONDS:
            self._last = time.monotonic()
            self._say(f"extract: {self._meter.counts} | {self._meter.shares}")

    def end(self, summary: RunSummary) -> None:
        if self._meter.pending:
            speed = f"{summary.rows:,} rows in {human_seconds(summary.seconds)}, {summary.rows_per_second:,.0f} rows/s"
            self._say(f"extracted: {speed}, {human_bytes(summary.bytes)} written")
            self._say(f"busy time: {self._meter.shares}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class LiveObserver(PlainObserver):
    """The same lines, and below them what goes on now: a spinner, then a bar with rate, time left and stages."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._spinner: Spinner | None = None
        self._live = Live(console=console, transient=True, refresh_per_second=5, get_renderable=self._render)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def phase(self, name: str, detail: str) -> None:
        super().phase(name, detail)
        self._spinner = Spinner("dots", name)

    def progress(self, phase: str, total: int, done: int) -> None:
        self._spinner = Spinner("dots", f"{phase}: {self._count(total, done)}")

    def begin(self, *, total: int, pending: int, workers: int) -> None:
        super().begin(total=total, pending=pending, workers=workers)
        self._spinner = None

    def report(self, report: UnitReport) -> None:
        self._last = time.monotonic()  # the bar replaces the plain lines
        super().report(report)

    def end(self, summary: RunSummary) -> None:
        self._live.stop()
        super().end(summary)

    def _render(self) -> RenderableType:
        if self._spinner is not None or not self._meter.pending:
            return self._spinner or Text("")
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self._meter.pending, completed=self._meter.rows, width=BAR_WIDTH)
        line.add_row(bar, Text(self._meter.counts, no_wrap=True, overflow="ellipsis"))
        return Group(line, Text(self._meter.shares, style="dim", no_wrap=True, overflow="ellipsis"))


def open_observer(console: Console) -> LiveObserver | PlainObserver:
    """The live display where `console` is a terminal, plain lines elsewhere."""
    return LiveObserver(console) if console.is_terminal else PlainObserver(console)
