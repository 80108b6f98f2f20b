"""The rows that are read: any of the units, none twice, whatever their number. What is measured: tests/cli."""

import tracemalloc

import numpy as np

from kpu.format.plan import Plan, SourceSpec
from kpu.tools.bench import draw_rows


def plan_of(rows: int, unit_rows: int) -> Plan:
    return Plan(
        source=SourceSpec(kind="folder", root="/"), fingerprint="", classes=None, samples=rows, views=1, seed=0,
        unit_rows=unit_rows, threads=1, samples_digests=(), metadata={},
    )  # fmt: skip


def test_all_rows_of_units_where_there_are_few() -> None:
    drawn = draw_rows(np.random.default_rng(0), plan_of(20, 8), np.array([2, 0]), 100)
    assert drawn.tolist() != sorted(drawn)
    assert sorted(drawn) == [*range(8), *range(16, 20)]


def test_every_row_is_as_likely() -> None:
    plan, units = plan_of(20, 8), np.array([0, 2])
    drawn = np.concatenate([draw_rows(np.random.default_rng(seed), plan, units, 6) for seed in range(2000)])
    counts = np.bincount(drawn, minlength=20)
    assert (counts[8:16] == 0).all()
    assert np.abs(np.delete(counts, range(8, 16)) - 1000).max() < 120  # 5 standard deviations


def test_of_very_many_rows() -> None:
    plan = plan_of(10**9 + 1, 1024)
    units = np.arange(1, plan.units, 2)
    tracemalloc.start()
    drawn = draw_rows(np.random.default_rng(0), plan, units, 4096)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * len(units)  # the numbers of their rows take 80 times as much
    assert len(np.unique(drawn)) == 4096
    assert (drawn // 1024 % 2 == 1).all()
    assert 0 <= drawn.min() < 10**7 and 99 * 10**7 < drawn.max() < plan.rows
