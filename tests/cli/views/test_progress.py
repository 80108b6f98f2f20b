"""How an extraction looks: plain lines, the live display, and the numbers in both."""

import io

import pytest
from rich.console import Console

from cli.views.progress import LiveObserver, Meter, PlainObserver, open_observer
from pipeline.run.records import RunSummary
from pipeline.run.reports import Task, UnitFailure, UnitReport

SUMMARY = RunSummary("id", "o.kpu", 128, 2.0, 4000, 1, 0, ())


def report(unit: int, *failures: UnitFailure) -> UnitReport:
    seconds = {"decode": 1.0, "forward": 3.0, "quantise": 0.0}
    return UnitReport(Task(unit, ("t",)), 64, 1, 2000, seconds, failures)


def play(observer: PlainObserver) -> None:
    with observer:
        observer.phase("load", "t")
        observer.phase("calibrate", "")
        observer.begin(total=192, pending=128, workers=2)
        observer.report(report(0))
        observer.report(report(1, UnitFailure(1, "t", "it broke [here]")))
        observer.end(SUMMARY)


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    observer = open_observer(Console(file=out, width=40))
    assert type(observer) is PlainObserver
    play(observer)
    assert out.getvalue().splitlines() == [
        "load: t",
        "extract: 128 of 192 rows on 2 workers, 64 are there already",
        "extracted: 128 rows in 2.0 s, 64 rows/s, 4 kB written",
        "busy time: decode 25%, forward 75%",
    ]
    assert capsys.readouterr().err == "warning: unit 1, teacher t, failed: it broke [here]\n"


def test_plain_lines_come_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("cli.views.progress.time.monotonic", lambda: now)
    out = io.StringIO()
    observer = PlainObserver(Console(file=out))
    observer.begin(total=256, pending=256, workers=1)
    for unit in range(3):
        now += 8.0
        observer.report(report(unit))
    assert out.getvalue().splitlines()[1:] == [
        "extract: 128/256 rows, 8 rows/s, 16.0 s left, 2 masked | decode 25%, forward 75%"
    ]


def test_calibration_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("cli.views.progress.time.monotonic", lambda: now)
    out = io.StringIO()
    observer = PlainObserver(Console(file=out))
    observer.phase("calibrate", "t on 2,048 rows")
    for _ in range(3):
        now += 6.0
        observer.progress("calibrate", 2048, int(now - 100) * 64)
    assert out.getvalue().splitlines() == ["calibrate: t on 2,048 rows", "calibrate: 768/2,048 rows, 20.0 s left"]
    live = LiveObserver(Console(file=io.StringIO(), force_terminal=True, width=100))
    live.phase("calibrate", "t on 2,048 rows")
    now += 4.0
    live.progress("calibrate", 2048, 1024)
    shown = io.StringIO()
    Console(file=shown, width=100).print(live._render())
    assert "calibrate: 1,024/2,048 rows, 4.0 s left" in shown.getvalue()


def test_nothing_left_to_do() -> None:
    out = io.StringIO()
    with PlainObserver(Console(file=out)) as observer:
        observer.begin(total=64, pending=0, workers=1)
        observer.end(SUMMARY)
    assert out.getvalue() == "extract: nothing is left to do\n"


def test_a_terminal_shows_a_bar_with_rate_and_stages() -> None:
    out = io.StringIO()
    observer = open_observer(Console(file=out, force_terminal=True, width=100))
    assert isinstance(observer, LiveObserver)
    play(observer)
    text = out.getvalue()
    assert "warning: unit 1, teacher t, failed: it broke [here]" in text
    assert "extracted: 128 rows in 2.0 s" in text
    shown = Console(file=io.StringIO(), width=100)
    shown.print(observer._render())
    assert isinstance(shown.file, io.StringIO)
    assert "128/128 rows" in shown.file.getvalue()
    assert "1 unit failed" in shown.file.getvalue()
    assert "decode 25%, forward 75%" in shown.file.getvalue()


def test_the_rate_is_of_the_last_units(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("cli.views.progress.time.monotonic", lambda: now)
    meter = Meter(64 * 1000)
    assert meter.counts == "0/64,000 rows, 0 rows/s, starting"
    for unit in range(100):
        now += 1.0 if unit >= 50 else 100.0
        meter.add(report(unit))
    assert meter.rate == pytest.approx(64.0)
    assert "15 min 00 s left" in meter.counts
