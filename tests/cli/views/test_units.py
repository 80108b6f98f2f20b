"""Numbers as people read them."""

import pytest

from cli.views.units import human_bytes, human_seconds, plural


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1234, "1.23 kB"), (45_600_000_000, "45.6 GB"), (123e12, "123 TB"),
     (5e15, "5 PB"), (2e19, "2e+04 PB")],
)  # fmt: skip
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1 min 01 s"), (3661, "1 h 01 min"), (90000, "1 d 1 h")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_plural() -> None:
    assert [plural(count, "unit") for count in (0, 1, 2000)] == ["0 units", "1 unit", "2,000 units"]
