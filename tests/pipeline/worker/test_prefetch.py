"""Running an iterator ahead of its consumer."""

import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.worker.prefetch import prefetch


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_order_is_kept(depth: int) -> None:
    assert list(prefetch(range(50), depth)) == list(range(50))


def test_no_more_than_depth_is_held_ahead() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    items = prefetch(source(), 2)
    assert next(items) == 0
    deadline = time.monotonic() + 60
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]  # one taken, two in the queue, one waiting for room
    items.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_at_its_place(depth: int) -> None:
    def source() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    items = prefetch(source(), depth)
    assert next(items) == 1
    with pytest.raises(OSError, match="gone"):
        next(items)


def test_closing_stops_the_thread() -> None:
    items = prefetch(iter(int, 1), 2)
    next(items)
    items.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
