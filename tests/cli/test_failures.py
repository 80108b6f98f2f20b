"""How a command ends that is interrupted, fails, or finds the disk full."""

import errno
import os
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import typer

from cli.failures import reported
from kpu.errors import ConfigError, KpuError, MissingUnitError, SourceError


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with it ignored
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_ends_with_1_and_says_what_goes_on(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    @reported()
    def command() -> None:
        os.kill(os.getpid(), number)
        for _ in range(6000):  # not signal.pause(): the signal may have come already
            time.sleep(0.01)

    with pytest.raises(typer.Exit) as ended:
        command()
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == "stopped: the same command begins again\n"


def test_what_goes_on_may_depend_on_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    def advice(options: Mapping[str, Any]) -> str:
        return f"{options['out']} is safe"

    @reported(advice)
    def command(**_options: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit):
        command(out="my [red]run")
    assert capsys.readouterr().err == "stopped: my [red]run is safe\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("a key:\n  is wrong"), 2, "error: a key: is wrong\n"),
        (MemoryError("1 TiB"), 1, "error: no memory is left (1 TiB); nothing that was committed is lost"),
        (MissingUnitError("t", 3), 1, "error: teacher 't' has no committed unit 3"),
        (
            OSError(errno.ENOSPC, "full", "a/file"),
            1,
            "error: a/file: no space left; nothing that was committed is lost",
        ),
    ],
)
def test_a_foreseen_error_is_one_line(
    error: KpuError | OSError | MemoryError, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @reported()
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        command()
    assert ended.value.exit_code == code
    assert capsys.readouterr().err.startswith(said)


def test_an_unforeseen_error_keeps_its_traceback() -> None:
    @reported()
    def command() -> None:
        raise OSError(errno.EINVAL, "what is this")

    with pytest.raises(OSError, match="what is this"):
        command()


def test_a_broken_disk_ends_with_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    @reported()
    def command() -> None:
        raise OSError(errno.EIO, "Input/output error", "/data/file")

    with pytest.raises(typer.Exit) as ended:
        command()
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == (
        "error: /data/file: Input/output error; nothing that was committed is lost: start again once it works\n"
    )


def test_no_message_shows_a_password(capsys: pytest.CaptureFixture[str]) -> None:
    @reported()
    def command() -> None:
        raise SourceError("cannot open url 'https://me:hunter2@host/x?X-Amz-Signature=abc': 403")

    with pytest.raises(typer.Exit):
        command()
    said = capsys.readouterr().err
    assert "https://me:***@host/x?X-Amz-Signature=***" in said
    assert "hunter2" not in said
