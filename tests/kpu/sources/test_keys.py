"""Duplicate keys are found among any number of rows, in bounded memory, and only true duplicates count."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from kpu.errors import SourceError
from kpu.sources import keys
from kpu.sources.keys import unique_keys
from kpu.sources.tables import sample_batch


def batches(names: list[str], size: int = 1000) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(names), size):
        part = pa.array(names[start : start + size])
        rows = pa.array(range(start, start + len(part)))
        yield sample_batch("tar", part, [pa.array(["f.tar"] * len(part)), rows, rows], pa.nulls(len(part), pa.int64()))


def count(names: list[str]) -> int:
    return sum(batch.num_rows for batch in unique_keys(lambda: batches(names)))


def test_unique_keys_pass() -> None:
    assert count([f"{i}" for i in range(50_000)]) == 50_000
    assert count([]) == 0


@pytest.mark.parametrize(("first", "again"), [(0, 1), (0, 9_999), (999, 1000), (4_321, 8_765)])
def test_one_duplicate_is_found_wherever_it_is(first: int, again: int) -> None:
    names = [f"key {i}" for i in range(10_000)]
    names[again] = names[first]
    with pytest.raises(
        SourceError, match=rf"'key {first}': first in f\.tar \(offset {first}, .*again in f\.tar \(offset {again},"
    ):
        count(names)


def test_equal_hashes_of_different_keys_are_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    # Real collisions of 64 bits are too rare to wait for: hash on one byte.
    monkeypatch.setattr(keys, "_hash", lambda column: np.array([hash(k) % 256 for k in column.to_pylist()], np.int64))
    names = [f"key {i}" for i in range(3_000)]
    assert count(names) == 3_000
    with pytest.raises(SourceError, match="duplicate key 'key 7'"):
        count([*names, "key 7"])


def test_memory_does_not_grow_with_the_length_of_keys() -> None:
    def listing() -> Iterator[pa.RecordBatch]:
        for start in range(0, 100_000, 2_000):
            yield from batches([f"{'x' * 200}{i}" for i in range(start, start + 2_000)], 2_000)

    tracemalloc.start()
    rows = sum(batch.num_rows for batch in unique_keys(listing))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 100_000
    assert peak < 4_000_000, "8 bytes a row, and one batch"
