"""Messages name what is at a path."""

from pathlib import Path

import pytest

from kpu.storage.found import describe_place
from tests.support.builders import SmallCache
from tests.support.trained import small_run


def test_places_are_named_by_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / f"images/{number}.png").touch()
    found = {name: describe_place(tmp_path / name) for name in ("none", "a.txt", "empty", "images")}
    assert found == {
        "none": "nothing",
        "a.txt": "a file",
        "empty": "an empty folder",
        "images": "a folder with '0.png', '1.png', '2.png', ...",
    }
    assert describe_place("s3://bucket/x") == "no plan.json"


def test_caches_and_runs_are_named_with_their_use(
    small_cache: SmallCache, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert describe_place(small_cache.path) == "a cache; `kpu-cache info` shows what it holds"
    run = small_run(tmp_path_factory.getbasetemp())
    assert describe_place(run).startswith("a run of kpu-train; measure it with `kpu-train eval`")
