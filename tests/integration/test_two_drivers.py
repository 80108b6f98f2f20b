"""Two drivers at once on one cache: both end well, and the cache is what one of them alone would have made."""

import random
import time
from pathlib import Path

import pytest
import yaml

from kpu.util.failpoints import NAMES
from tests.integration.harness import Command, Failpoint, assert_verified, differences, run

SKIPS = {"plan": (0,), "teacher": (0, 1), "publish": (0, 1, *range(2, 70, 18)), "unit": (0, 3), "run": (0,)}
QUICK = {("publish.temporary", 0), ("teacher.statistics", 0), ("unit.shards", 0), ("publish.linked", 38)}
POINTS = [
    pytest.param(name, skip, marks=() if (name, skip) in QUICK else pytest.mark.slow)
    for name in NAMES
    for skip in SKIPS[name.partition(".")[0]]
]


def assert_both_made(out: Path, reference: dict[str, str], *commands: Command) -> None:
    """Every command ended well, and together they made the cache `out`."""
    for command in commands:
        ended = command.finish()
        assert ended.code == 0, ended.output
    assert differences(out, reference) == []
    assert_verified(out)


@pytest.mark.parametrize("delay", [0.0, *(pytest.param(s / 10, marks=pytest.mark.slow) for s in range(1, 11))])
def test_two_drivers_at_once(delay: float, config: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "my.kpu"
    first = Command(tmp_path, "extract", "-c", config, "-o", out)
    time.sleep(delay)
    assert_both_made(out, reference, first, Command(tmp_path, "extract", "-c", config, "-o", out))


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(5))
def test_five_drivers_at_once(attempt: int, config: Path, reference: dict[str, str], tmp_path: Path) -> None:
    del attempt
    out = tmp_path / "my.kpu"
    assert_both_made(out, reference, *[Command(tmp_path, "extract", "-c", config, "-o", out) for _ in range(5)])


@pytest.mark.parametrize(("name", "skip"), POINTS)
def test_one_is_held_while_the_other_does_all(
    name: str, skip: int, config: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "my.kpu"
    point = Failpoint(name, tmp_path / "mark", "hold", skip)
    held = Command(tmp_path, "extract", "-c", config, "-o", out, **point.variables)
    assert point.reached(held) == held.pid
    other = run(tmp_path, "extract", "-c", config, "-o", out)
    assert other.code == 0, other.output
    point.release()
    assert_both_made(out, reference, held)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "skip"), [("publish.temporary", 20), ("publish.linked", 20), ("unit.images", 1)])
def test_one_is_killed_while_the_other_runs(
    name: str, skip: int, config: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "my.kpu"
    point = Failpoint(name, tmp_path / "mark", "hold", skip)
    held = Command(tmp_path, "extract", "-c", config, "-o", out, **point.variables)
    assert point.reached(held)
    other = Command(tmp_path, "extract", "-c", config, "-o", out)
    time.sleep(0.3)
    held.kill()
    assert other.finish().code == 0
    assert_both_made(out, reference, Command(tmp_path, "extract", "-c", config, "-o", out))


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(5))
def test_killed_and_started_again_while_the_other_runs(
    attempt: int, config: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "my.kpu"
    moments = random.Random(attempt)
    other = Command(tmp_path, "extract", "-c", config, "-o", out)
    for _ in range(4):
        command = Command(tmp_path, "extract", "-c", config, "-o", out)
        time.sleep(moments.uniform(0.1, 0.6))
        command.kill()
    assert_both_made(out, reference, other, Command(tmp_path, "extract", "-c", config, "-o", out))


def test_each_driver_brings_its_own_teacher(config: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "my.kpu"
    values = yaml.safe_load(config.read_text())
    commands = []
    for name, teacher in values["teachers"].items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**values, "teachers": {name: teacher}}))
        commands.append(Command(tmp_path, "extract", "-c", path, "-o", out))
    assert_both_made(out, reference, *commands)


@pytest.mark.slow
def test_one_in_this_process_and_one_on_ray(config: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "my.kpu"
    point = Failpoint("unit.computed", tmp_path / "mark", "hold")
    ray = Command(tmp_path, "extract", "-c", config, "-o", out, "--executor", "ray", **point.variables)
    assert point.reached(ray)
    inline = Command(tmp_path, "extract", "-c", config, "-o", out)
    point.release()
    assert_both_made(out, reference, ray, inline)
