"""Ctrl-C and SIGTERM: exit code 1, one message on how to resume, and the same command completes the cache."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.harness import (
    Command,
    Ended,
    Failpoint,
    assert_resumed,
    assert_stopped_clearly,
    assert_verified,
    run,
    session,
    standing,
    wait_for,
)

SIGNALS = ("Ctrl-C", "SIGTERM")
# (executor, the point at which the run is held when it is told to stop)
POINTS = [
    ("inline", "plan.samples"),
    ("inline", "teacher.arrays"),
    ("inline", "unit.computed"),
    ("inline", "publish.synced"),
    ("inline", "run.finished"),
    ("ray", "plan.samples"),
    ("ray", "unit.computed"),
    ("ray", "unit.shards"),
]
QUICK = {("inline", "unit.computed", "Ctrl-C"), ("inline", "teacher.arrays", "SIGTERM")}
PAST_THE_PLAN = 38
MOMENTS = 10


def stop(command: Command, how: str) -> None:
    command.interrupt() if how == "Ctrl-C" else command.signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("executor", "name", "how"),
    [
        pytest.param(*point, how, marks=() if (*point, how) in QUICK else pytest.mark.slow)
        for point in POINTS
        for how in SIGNALS
    ],
)
def test_told_to_stop_at_a_step(
    executor: str, name: str, how: str, config: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "my.kpu"
    arguments = ["extract", "-c", config, "-o", out, "--executor", executor, "--set", "executor.workers=1"]
    skip = PAST_THE_PLAN if name.startswith("publish") else 0
    point = Failpoint(name, tmp_path / "mark", "hold", skip)
    command = Command(tmp_path, *arguments, **point.variables)
    assert point.reached(command), command.output
    stop(command, how)
    time.sleep(0.1)
    point.release()
    assert_stopped_clearly(command.finish())
    wait_for(lambda: not command.workers())
    before = standing(out)
    assert_resumed(out, before, reference, run(tmp_path, *arguments))
    assert_verified(out)


@pytest.mark.slow
@pytest.mark.parametrize("how", SIGNALS)
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_told_to_stop_at_a_random_moment(
    moment: int, how: str, config: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "my.kpu"
    command = Command(tmp_path, "extract", "-c", config, "-o", out)
    assert command.says("load:")
    time.sleep(random.Random(f"{moment} {how}").uniform(0, 1))
    stop(command, how)
    ended = command.finish()
    if ended.code:  # else it was done already
        assert_stopped_clearly(ended)
    assert_resumed(out, standing(out), reference, run(tmp_path, "extract", "-c", config, "-o", out))


@pytest.mark.slow
@pytest.mark.parametrize("how", SIGNALS)
@pytest.mark.parametrize("delay", [0.2, 2, 5])
def test_told_to_stop_while_ray_starts(
    delay: float, how: str, config: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "my.kpu"
    command = Command(tmp_path, "extract", "-c", config, "-o", out, "--executor", "ray")
    assert command.says("load:")
    time.sleep(delay)
    stop(command, how)
    assert_stopped_clearly(command.finish())
    wait_for(lambda: not session(command.pid))
    assert_resumed(out, standing(out), reference, run(tmp_path, "extract", "-c", config, "-o", out))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_installed_command_is_told_to_stop(
    number: signal.Signals, config: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    installed = Path(sys.executable).parent / "kpu-cache"
    if not installed.exists():
        pytest.skip(f"kpu is not installed: there is no {installed}")
    out = tmp_path / "my.kpu"
    arguments = [str(installed), "extract", "-c", str(config), "-o", str(out)]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stdout is not None
    while "calibrate:" not in (line := process.stdout.readline()):
        assert line
    process.send_signal(number)
    output, _ = process.communicate()
    assert_stopped_clearly(Ended(process.returncode, output))
    assert_resumed(out, standing(out), reference, run(tmp_path, "extract", "-c", config, "-o", out))
