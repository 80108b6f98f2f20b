"""Signals that come while a library starts up that handles them in its own way."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType

import pytest

from pipeline.executors.signals import stop_signals_kept

Handler = Callable[[int, FrameType | None], object]


def own(_number: int, _frame: FrameType | None) -> None:
    """The handler of the command."""


def exits(number: int, _frame: FrameType | None) -> None:
    sys.exit(number)


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    former = signal.signal(signal.SIGTERM, own), signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, former[0])
    signal.signal(signal.SIGINT, former[1])


@pytest.mark.parametrize("handler", [exits, own])
def test_what_its_handler_makes_of_a_signal_is_an_interruption(handler: Handler) -> None:
    """Whether what the handler raises comes through, or is lost in a fork."""
    with pytest.raises(KeyboardInterrupt), stop_signals_kept():
        signal.signal(signal.SIGTERM, handler)
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is own


def test_ctrl_c_that_was_lost_is_made_up_for() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals_kept(), suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_without_a_signal_nothing_happens() -> None:
    with stop_signals_kept():
        signal.signal(signal.SIGTERM, exits)
    assert signal.getsignal(signal.SIGTERM) is own
    with pytest.raises(SystemExit), stop_signals_kept():
        sys.exit(3)
