"""Turning errors and interruptions into one clear message and the right exit code."""

import errno
import signal
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

import typer

from cli.output import console
from kpu.errors import KpuError
from kpu.storage.places import redact
from kpu.util.faults import FAULTS

P = ParamSpec("P")
T = TypeVar("T")
Advice = str | Callable[[Mapping[str, Any]], str]


def reported(advice: Advice = "the same command begins again") -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a command end with one message on standard error and an exit code; unforeseen errors keep their traceback.

    A KpuError has a code of its own; Ctrl-C and SIGTERM end with 1 and `advice`, which may depend on the options.
    """

    def wrap(command: Callable[P, T]) -> Callable[P, T]:
        @wraps(command)
        def run(*arguments: P.args, **options: P.kwargs) -> T:
            signal.signal(signal.SIGTERM, _interrupt)
            try:
                return command(*arguments, **options)
            except KpuError as error:
                _fail("; ".join([str(error), *getattr(error, "__notes__", ())]), error.exit_code)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    _fail(f"{error.filename or 'disk'}: no space left; nothing that was committed is lost", 1)
                if error.errno in FAULTS:
                    said = f"{error.filename or 'disk or network'}: {error.strerror}"
                    _fail(f"{said}; nothing that was committed is lost: start again once it works", 1)
                raise
            except MemoryError as error:
                _fail(
                    f"no memory is left ({error}); nothing that was committed is lost: give it more, or less to do", 1
                )
            except KeyboardInterrupt:
                said = advice if isinstance(advice, str) else advice(options)
                console(stderr=True).print(f"stopped: {said}", markup=False, soft_wrap=True)
                raise typer.Exit(1) from None

        return run

    return wrap


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    message = redact(message)  # libraries quote URLs, passwords included
    line = " ".join(part.strip() for part in message.splitlines())  # other libraries' reasons come in several lines
    console(stderr=True).print(f"error: {line}", style="red", markup=False, soft_wrap=True)
    raise typer.Exit(code) from None
