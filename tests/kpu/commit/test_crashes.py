"""A run killed at any step, then run again, leaves the cache that an uninterrupted run makes."""

import multiprocessing
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from kpu.storage.leases import collect_garbage, dead_runs
from kpu.tools.verify import verify
from tests.support.builders import SmallCache, build, tree

PUBLISHING = ("publish.temporary", "publish.synced", "publish.linked", "publish.done")
STEPS = [
    *(("plan", point) for point in (*PUBLISHING, "plan.samples", "plan.published")),
    *(("teacher", point) for point in (*PUBLISHING, "teacher.statistics", "teacher.arrays", "teacher.published")),
    *(("unit", point) for point in (*PUBLISHING, "unit.images", "unit.shards", "unit.committed")),
]


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """Forks processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.builders"])
    return context


@pytest.mark.parametrize("step", STEPS, ids=".".join)
def test_killed_at_a_step_and_run_again(
    server: ForkServerContext, built_cache, tmp_path: Path, step: tuple[str, str]
) -> None:
    path = tmp_path / "a.kpu"
    process = server.Process(target=build, args=(path,), kwargs={"run": "killed", "arm": step})
    process.start()
    process.join(60)
    assert process.exitcode == -9, "the failpoint did not fire"

    committed = {file: raw for file, raw in tree(path).items() if "/commits/" in file}
    again: SmallCache = build(path, run="again")
    whole = tree(path)
    assert whole == tree(built_cache("uniform").path)
    assert committed.items() <= whole.items()
    assert verify(path).ok
    assert dead_runs(again.storage) == ["killed"]
    collect_garbage(again.storage, quarantine=True)
    assert tree(path) == whole
    assert not [entry for entry in (path / ".tmp").iterdir() if entry.is_dir()]


def test_two_drivers_at_once_make_one_cache(server: ForkServerContext, built_cache, tmp_path: Path) -> None:
    path = tmp_path / "a.kpu"
    drivers = [server.Process(target=build, args=(path,), kwargs={"run": f"driver-{k}"}) for k in range(3)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(60)
    assert [driver.exitcode for driver in drivers] == [0, 0, 0]
    assert tree(path) == tree(built_cache("uniform").path)
    assert verify(path).ok
