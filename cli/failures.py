"""Turning errors into one clear message and the right exit code."""

import errno
from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec, TypeVar

import typer

from cache.errors import KpuError
from cli.console import console

P = ParamSpec("P")
T = TypeVar("T")


def reported(command: Callable[P, T]) -> Callable[P, T]:
    """Print a KpuError as one message on standard error and exit with its code; other errors keep their traceback."""

    @wraps(command)
    def run(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return command(*arguments, **options)
        except KpuError as error:
            _fail(str(error), error.exit_code)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                _fail(f"{error.filename or 'disk'}: no space left; nothing that was committed is lost", 1)
            raise

    return run


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(part.strip() for part in message.splitlines())  # other libraries' reasons come in several lines
    console(stderr=True).print(f"error: {line}", style="red", markup=False, soft_wrap=True)
    raise typer.Exit(code) from None
