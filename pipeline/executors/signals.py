"""Being told to stop while a library starts up that handles signals in its own way."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

_STOP: Final = frozenset({signal.SIGINT, signal.SIGTERM})
_MANY: Final = 4096


@contextmanager
def stop_signals_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM, and raise KeyboardInterrupt at the end if SIGINT or SIGTERM came meanwhile.

    Ray installs a handler of SIGTERM that exits without a word. It also forks, and Python drops what a handler raises
    while the hooks of a fork run. Outside the main thread, where no signal is handled, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    former = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    received: set[int] = set()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former)
        signal.signal(signal.SIGTERM, handler)
        with suppress(BlockingIOError):  # none came
            received.update(os.read(reading, _MANY))
        os.close(reading)
        os.close(writing)
        if received & _STOP:
            raise KeyboardInterrupt from None
