"""SIGKILL at every step and at random moments, and full disks: the same command again completes the same cache."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kpu import open_cache
from kpu.util.failpoints import NAMES
from tests.integration.harness import (
    Command,
    Failpoint,
    assert_resumed,
    assert_verified,
    contents,
    run,
    standing,
)

# How often to pass a point before it fires: the first files that are published are probes, then the plan's, then each
# teacher's, then the units'.
SKIPS = {"plan": (0,), "teacher": (0, 1), "publish": (0, 1, *range(2, 70, 9)), "unit": (0, 1, 4), "run": (0,)}
QUICK = {("plan.samples", 0), ("teacher.arrays", 1), ("publish.temporary", 38), ("unit.shards", 4)}
MOMENTS = 50
MIB = 2**20

POINTS = [
    pytest.param(name, skip, marks=() if (name, skip) in QUICK else pytest.mark.slow)
    for name in NAMES
    for skip in SKIPS[name.partition(".")[0]]
]


@pytest.mark.parametrize(("name", "skip"), POINTS)
def test_killed_at_a_step(name: str, skip: int, config: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "my.kpu"
    point = Failpoint(name, tmp_path / "mark", skip=skip)
    killed = run(tmp_path, "extract", "-c", config, "-o", out, **point.variables)
    assert killed.code == -signal.SIGKILL, killed.output
    before = standing(out)
    assert_resumed(out, before, reference, run(tmp_path, "extract", "-c", config, "-o", out))
    assert_verified(out)


TAR_POINTS = [("publish.temporary", 38), ("publish.linked", 47), ("unit.shards", 4), ("unit.committed", 1)]


@pytest.mark.parametrize(
    ("name", "skip"),
    [pytest.param(*point, marks=() if at == 2 else pytest.mark.slow) for at, point in enumerate(TAR_POINTS)],
)
def test_killed_at_a_step_in_tars(name: str, skip: int, config: Path, finished_in_tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "my.kpu"
    command = ("extract", "-c", config, "-o", out, "--set", "format=webdataset")
    point = Failpoint(name, tmp_path / "mark", skip=skip)
    killed = run(tmp_path, *command, **point.variables)
    assert killed.code == -signal.SIGKILL, killed.output
    before = standing(out)
    assert_resumed(out, before, contents(finished_in_tars), run(tmp_path, *command))
    assert_verified(out)


def test_both_formats_hold_the_same(finished: Path, finished_in_tars: Path) -> None:
    one, other = open_cache(finished), open_cache(finished_in_tars)
    assert one.plan.digest == other.plan.digest
    for name, teacher in one.teachers.items():
        assert teacher.published.fingerprint == other.teachers[name].published.fingerprint
        assert other.teachers[name].spec.format == "webdataset"
        for output in teacher.outputs:
            here, there = (cache.read_encoded(name, output, slice(None)).values for cache in (one, other))
            np.testing.assert_array_equal(here, there)


def test_a_cache_is_not_continued_in_the_other_format(finished: Path, config: Path, tmp_path: Path) -> None:
    ended = run(tmp_path, "extract", "-c", config, "-o", finished, "--set", "format=webdataset")
    assert ended.code == 2, ended.output
    assert 'format: expected "zarr", found "webdataset"' in " ".join(ended.output.split())


@pytest.mark.slow
def test_killed_at_every_step_one_after_the_other(config: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "my.kpu"
    done = 0
    for name in NAMES:
        past_the_probe = 3 if name.startswith("publish") else 0
        point = Failpoint(name, tmp_path / name, skip=past_the_probe)
        killed = run(tmp_path, "extract", "-c", config, "-o", out, **point.variables)
        assert killed.code == -signal.SIGKILL, killed.output
        assert len(standing(out).done) >= done
        done = len(standing(out).done)
    assert_resumed(out, standing(out), reference, run(tmp_path, "extract", "-c", config, "-o", out))
    assert_verified(out)


@pytest.fixture(scope="module")
def seconds(config: Path, reference: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long an uninterrupted run takes."""
    del reference
    folder = tmp_path_factory.mktemp("timed")
    start = time.monotonic()
    run(folder, "extract", "-c", config, "-o", folder / "my.kpu")
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_killed_at_a_random_moment(
    moment: int, config: Path, reference: dict[str, str], seconds: float, tmp_path: Path
) -> None:
    out = tmp_path / "my.kpu"
    command = Command(tmp_path, "extract", "-c", config, "-o", out)
    time.sleep(random.Random(moment).uniform(0, seconds))
    command.kill()
    before = standing(out)
    assert_resumed(out, before, reference, run(tmp_path, "extract", "-c", config, "-o", out))
    assert_verified(out)


def test_a_cache_that_is_complete_is_left_alone(
    config: Path, finished: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    before = standing(finished)
    assert len(before.done) == 10
    assert_resumed(finished, before, reference, run(tmp_path, "extract", "-c", config, "-o", finished))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small disk takes root's rights")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, spare: int) -> Path:
    """A file that leaves `spare` bytes of the disk."""
    filler = disk / "filler"
    status = os.statvfs(disk)
    filler.write_bytes(bytes(status.f_bavail * status.f_frsize - spare))
    return filler


@pytest.mark.parametrize(
    ("spare", "executor"),
    [
        (MIB, "inline"),
        *(pytest.param(spare, "inline", marks=pytest.mark.slow) for spare in (0, MIB // 64, MIB // 4)),
        pytest.param(MIB, "ray", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_loses_nothing(
    spare: int, executor: str, config: Path, reference: dict[str, str], small_disk: Path, tmp_path: Path
) -> None:
    out = small_disk / "my.kpu"
    filler = fill(small_disk, spare)
    full = run(tmp_path, "extract", "-c", config, "-o", out, "--executor", executor)
    assert full.code == 1, full.output
    assert "Traceback" not in full.output
    assert full.output.count("error:") == 1
    assert "No space left on device; free some space" in full.output
    before = standing(out)
    filler.unlink()
    if spare == MIB:
        assert before.done
        status = run(tmp_path, "status", "--json", out)
        assert status.code == 1
        committed = [teacher["committed_units"] for teacher in json.loads(status.output)["teachers"].values()]
        assert sum(committed) == len(before.done)
    assert_resumed(out, before, reference, run(tmp_path, "extract", "-c", config, "-o", out))
    assert_verified(out)
