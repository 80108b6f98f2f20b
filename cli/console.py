"""Where text goes: consoles that cut nothing off and never fail, whoever reads them."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_WIDTH: Final = 160
PLAIN_EVERY_SECONDS: Final = 10.0


def console(*, stderr: bool = False) -> Console:
    """Standard output or error; where it is no terminal and nobody says how wide it is, lines may be long."""
    plain = Console(stderr=stderr, highlight=False)
    if plain.is_terminal or "COLUMNS" in os.environ:
        return plain
    return Console(stderr=stderr, highlight=False, width=_PLAIN_WIDTH)


def escape_unprintable() -> None:
    """Let both streams write what their encoding lacks, such as the name of a file, as an escape instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def progress_note(line: str) -> None:
    """Say on standard error what goes on now; results go to standard output."""
    console(stderr=True).print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, moved by calls of (done, total) and gone at the end; lines where that is no terminal."""
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    error = console(stderr=True)
    if not error.is_terminal:
        yield _now_and_then(what)
        return
    with Progress(*columns, console=error, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _now_and_then(what: str) -> Callable[[int, int], None]:
    last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_EVERY_SECONDS:
            last = time.monotonic()
            progress_note(f"{what}: {done:,}/{total:,}")

    return tell
