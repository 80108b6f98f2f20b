"""Rows kept in memory, and how much memory there is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kpu import Cache, open_cache
from kpu.util import memory
from trainer.data.resident import RowCache, free_memory


def counting(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes how many rows are read from the cache, call by call."""
    counts: list[int] = []
    read = cache.read_encoded

    def counted(teacher: str, output: str, rows: np.ndarray, **more: Any) -> object:
        counts.append(len(rows))
        return read(teacher, output, rows, **more)

    monkeypatch.setattr(cache, "read_encoded", counted)
    return counts


def taken(kept: RowCache, cache: Cache, output: str, rows: Sequence[int]) -> np.ndarray:
    array = cache.teachers["big"].published.layouts[output]
    out = np.empty((len(rows), *array.item_shape), array.dtype)
    numbers = np.array(rows)
    kept.take(cache, "big", output, numbers, kept.valid(cache, "big", numbers), out)
    return out


def test_a_row_is_read_once_where_there_is_room(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(toys)
    expected = cache.read_encoded("big", "patch", slice(None)).values
    counts = counting(cache, monkeypatch)
    kept = RowCache(2**20)
    for rows in ([3, 1, 3], [1, 2, 69], [69, 3]):
        np.testing.assert_array_equal(taken(kept, cache, "patch", rows), expected[rows])
    assert counts == [2, 2]


def test_what_is_given_out_is_the_callers_own(toys: Path) -> None:
    kept, cache = RowCache(2**20), open_cache(toys)
    first = taken(kept, cache, "patch", range(3))
    expected = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(taken(kept, cache, "patch", range(3)), expected)


def test_outputs_without_room_are_read_each_time(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(toys)
    array = cache.teachers["big"].published.layouts["global"]
    size = cache.rows * int(np.prod(array.item_shape)) * array.dtype.itemsize
    counts = counting(cache, monkeypatch)
    kept = RowCache(size)
    for _ in range(2):
        for output in ("global", "patch"):
            taken(kept, cache, output, range(5))
    assert counts == [64, 5, 5]  # a whole chunk of `global` once, `patch` twice


def test_rows_that_share_a_chunk_are_read_together(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(toys)
    expected = cache.read_encoded("big", "global", slice(None)).values
    counts = counting(cache, monkeypatch)
    kept = RowCache(2**20)
    for rows in ([1], [63, 0, 68], [69, 64]):
        np.testing.assert_array_equal(taken(kept, cache, "global", rows), expected[rows])
    assert counts == [64, cache.rows - 64]


def test_free_memory_is_a_share_of_the_lower_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert free_memory() == 0
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:   1000 kB\n")
    assert free_memory() == int(0.4 * 1000 * 1024)
    assert free_memory(4) == int(0.4 * 1000 * 1024 / 4)
    (tmp_path / "memory.current").write_text("100\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() == int(0.4 * 1000 * 1024)
    (tmp_path / "memory.max").write_text("5100\n")
    assert free_memory() == 2000
