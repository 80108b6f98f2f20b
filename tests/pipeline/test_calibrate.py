"""Which rows calibration looks at, and the moments of what it sees."""

import numpy as np
import pytest
import torch

from cache.spec import CodecSpec, InputSpec, OutputSpec, Plan, SourceSpec, TeacherSpec
from cache.statistics import Accumulator
from pipeline.calibrate import choose_rows, moments, thin_calibration

PINNED = [23434, 34058, 67044]


def plan(rows: int, seed: int = 0) -> Plan:
    return Plan(
        source=SourceSpec(kind="folder", root="/"),
        fingerprint="",
        classes=None,
        samples=rows,
        views=1,
        seed=seed,
        unit_rows=64,
        threads=1,
        samples_digests=(),
        metadata={},
    )


def teacher(channels: int) -> TeacherSpec:
    return TeacherSpec(
        name="base",
        model="timm:any",
        weights=None,
        weights_digest="",
        input=InputSpec(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1)),
        precision="fp32",
        outputs=(
            OutputSpec(name="global", shape=(channels,)),
            OutputSpec(name="patch", shape=(4, 2 * channels), grid=(2, 2)),
        ),
        codec=CodecSpec(),
    )


@pytest.mark.parametrize(
    ("rows", "widest", "asked", "expected"),
    [
        (10**9, 64, "auto", 2048),
        (10**9, 768, "auto", 7680),
        (1000, 768, "auto", 1000),
        (10**9, 768, 33, 33),
        (5, 768, 33, 5),
        (1, 768, "auto", 1),
    ],
)
def test_rows_are_sorted_distinct_and_as_many_as_needed(rows: int, widest: int, asked: int, expected: int) -> None:
    chosen = choose_rows(plan(rows), widest, asked)
    assert chosen.dtype == np.int64
    assert len(chosen) == expected
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < rows


def test_rows_cover_the_plan_evenly_and_depend_on_the_seed() -> None:
    chosen = choose_rows(plan(100_000), 64, 1000)
    assert np.bincount(chosen // 10_000).tolist() == [100] * 10
    assert np.array_equal(chosen, choose_rows(plan(100_000), 64, 1000))
    assert not np.array_equal(chosen, choose_rows(plan(100_000, seed=1), 64, 1000))
    assert choose_rows(plan(100_000, seed=2**63 - 1), 64, 3).tolist() == PINNED


def test_too_few_rows_are_told() -> None:
    assert thin_calibration(teacher(100), 1000) is None
    warning = thin_calibration(teacher(100), 999)
    assert warning is not None
    assert "'base'" in warning
    assert "999 rows" in warning
    assert "100 channels" in warning


@pytest.mark.parametrize("shape", [(50, 6), (50, 9, 6)])
def test_moments_merge_into_those_of_the_whole(shape: tuple[int, ...]) -> None:
    x = (np.random.default_rng(0).normal(size=shape) * 3 + 1000).astype(np.float32)
    batches, whole = Accumulator(6), Accumulator(6)
    for part in np.split(x, [20, 21]):
        count, mean, comoment = moments(torch.from_numpy(part))
        assert mean.dtype == comoment.dtype == np.float64
        batches.add(count, mean, comoment)
    whole.update(x.reshape(-1, 6))
    ours, reference = batches.finish(0.05), whole.finish(0.05)
    assert ours.count == x.size // 6
    np.testing.assert_allclose(ours.mean, x.reshape(-1, 6).astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(ours.covariance, np.cov(x.reshape(-1, 6).T.astype(np.float64), bias=True), rtol=1e-9)
    np.testing.assert_allclose(ours.covariance, reference.covariance, rtol=1e-9)
