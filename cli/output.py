"""Where text goes: consoles that cut nothing off and never fail, whoever reads them."""

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment

_PLAIN_WIDTH: Final = 160
PLAIN_EVERY_SECONDS: Final = 10.0
_KEPT: Final = (ord("\n"), ord("\t"))
_CONTROLS: Final = (*range(0x20), *range(0x7F, 0xA0))
_DIRECTIONS: Final = (0x061C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_STEERING_IN_JSON: Final = {code: f"\\u{code:04x}" for code in (*_CONTROLS, *_DIRECTIONS) if code not in _KEPT}
_STEERING: Final = _STEERING_IN_JSON | {code: f"\\x{code:02x}" for code in _CONTROLS if code not in _KEPT}


def printable(text: str) -> str:
    """Text with everything that steers a terminal, or turns the direction of writing, spelled out: `\\x1b`.

    Names of classes, keys, roots and reasons come from files that anybody may have made.
    """
    return text.translate(_STEERING)


def dump_json(document: Any, indent: int | None = None) -> str:
    """JSON for standard output: the same document, and safe to look at."""
    return json.dumps(document, indent=indent, ensure_ascii=False).translate(_STEERING_IN_JSON)


class SafeConsole(Console):
    """A console that prints no text but what is `printable`; styles are its own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def console(*, stderr: bool = False) -> Console:
    """Standard output or error; where it is no terminal and nobody says how wide it is, lines may be long."""
    plain = SafeConsole(stderr=stderr, highlight=False, emoji=False)
    if plain.is_terminal or "COLUMNS" in os.environ:
        return plain
    return SafeConsole(stderr=stderr, highlight=False, emoji=False, width=_PLAIN_WIDTH)


def escape_unprintable() -> None:
    """Let both streams write what their encoding lacks, such as the name of a file, as an escape instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(console: Console, line: str) -> None:
    """Print a line as it is, however long."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


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
