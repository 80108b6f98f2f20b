"""Fixtures for the tests of the on-disk format."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.builders import SmallCache, build


@pytest.fixture(scope="session")
def built_cache(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SmallCache]:
    """Gives the small cache stored with a codec, built once a session; not to be written to."""
    built: dict[str, SmallCache] = {}

    def get(codec: str = "uniform") -> SmallCache:
        if codec not in built:
            built[codec] = build(tmp_path_factory.mktemp("built") / f"{codec}.kpu", codec=codec)
        return built[codec]

    return get


@pytest.fixture
def cache_of(built_cache: Callable[[str], SmallCache], tmp_path: Path) -> Callable[[str], SmallCache]:
    """Gives a fresh copy of the small cache, stored with a codec, to damage at will."""

    def copy(codec: str) -> SmallCache:
        original, path = built_cache(codec), tmp_path / f"{codec}.kpu"
        shutil.copytree(original.path, path)
        return replace(original, path=path)

    return copy


@pytest.fixture
def small_cache(cache_of: Callable[[str], SmallCache]) -> SmallCache:
    """A fresh copy of the small cache of `tests.support.builders`, with the default codec."""
    return cache_of("uniform")
