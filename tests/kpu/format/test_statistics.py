"""Statistics do not depend on how the rows were split, and put a raw 0 on the grid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpu.errors import CorruptError, SourceError
from kpu.format.statistics import Accumulator, Statistics, dump_statistics, load_statistics, snap


def accumulate(x: np.ndarray, cuts: list[int] | None = None) -> Statistics:
    accumulator = Accumulator(x.shape[1])
    for part in np.split(x, sorted(cuts or [])):
        accumulator.update(part)
    return accumulator.finish(0.05)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=20), st.integers(0, 2**32 - 1), st.floats(-1e4, 1e4))
def test_any_split_gives_numpys_covariance(cuts: list[int], seed: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(4, (300, 6)) * np.exp(rng.normal(0, 2, 6)) + offset).astype(np.float32)
    stats = accumulate(x, cuts)
    wide = x.astype(np.float64)
    assert stats.count == 300
    expected = np.cov(wide.T, bias=True)
    tolerance = 1e-9 * np.sqrt(np.outer(np.diag(expected), np.diag(expected))).max()
    np.testing.assert_allclose(stats.mean, wide.mean(0), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(stats.covariance, expected, rtol=1e-9, atol=tolerance)
    np.testing.assert_array_equal(stats.covariance, stats.covariance.T)
    np.testing.assert_array_equal(stats.variance, np.diag(stats.covariance))


def test_moments_of_batches_merge_like_their_rows() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 5))
    accumulator = Accumulator(5)
    for part in (x[:1], x[1:40], x[40:40], x[40:]):
        mean = part.mean(0) if len(part) else np.zeros(5)
        accumulator.add(len(part), mean, (part - mean).T @ (part - mean))
    np.testing.assert_allclose(accumulator.finish(0.05).covariance, np.cov(x.T, bias=True), rtol=1e-12)


def test_input_is_not_changed() -> None:
    x = np.arange(12, dtype=np.float64).reshape(6, 2)
    accumulate(x)
    np.testing.assert_array_equal(x, np.arange(12).reshape(6, 2))


def test_dead_channels_get_a_floor() -> None:
    x = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32) * np.array([1, 2, 3, 0], np.float32)
    std = accumulate(x).std
    assert std[3] == pytest.approx(1e-4 * np.sqrt(np.mean(accumulate(x).variance)))
    np.testing.assert_allclose(std[:3], [1, 2, 3], rtol=0.1)
    assert (accumulate(np.full((10, 3), 7.0)).std == 1e-6).all()
    assert (accumulate(np.ones((1, 3))).std == 1e-6).all()


def test_nothing_to_calibrate_on() -> None:
    with pytest.raises(SourceError, match="at least one valid row, found none"):
        Accumulator(3).finish(0.05)


@settings(max_examples=150, deadline=None)
@given(
    st.floats(-1e6, 1e6, width=32),
    st.floats(2**-10, 1e6, width=32),
    st.sampled_from([0.01, 0.05, 0.1, 1 / 3, 1.0]),
)
def test_the_centre_is_near_the_mean_and_a_whole_number_of_steps_from_zero(
    mean: float, std: float, step: float
) -> None:
    centre, scale = snap(np.array([mean]), np.array([std]), step)
    assert centre.dtype == scale.dtype == np.float32
    assert abs(float(centre[0]) - mean) <= float(scale[0]) / 2 * 1.001 + 2**-22 * abs(mean)
    steps = np.rint(centre / scale)
    if abs(steps[0]) < 2**20:  # far beyond what a stored integer can hold
        assert (centre == steps * scale).all()


def test_statistics_survive_serialisation_with_equal_bytes() -> None:
    rng = np.random.default_rng(0)
    stats = {
        name: accumulate(rng.normal(size=(50, d))) for name, d in (("patch", 3), ("global", 4), ("layer6.patch", 5))
    }
    metadata = {f"key {number}": f"value {number} ≤" for number in range(20)}
    raw = dump_statistics(stats, metadata)
    assert raw == dump_statistics(dict(reversed(stats.items())), dict(reversed(metadata.items())))
    loaded, loaded_metadata = load_statistics(raw, "stats.safetensors")
    assert list(loaded) == ["global", "layer6.patch", "patch"]
    assert loaded_metadata == metadata
    for name, expected in stats.items():
        assert loaded[name].count == 50
        for field in ("mean", "centre", "variance", "covariance", "std", "zeros"):
            np.testing.assert_array_equal(getattr(loaded[name], field), getattr(expected, field))
    assert dump_statistics(loaded, loaded_metadata) == raw


def test_broken_statistics_are_refused() -> None:
    from safetensors.numpy import save

    good = accumulate(np.random.default_rng(0).normal(size=(50, 3)))
    raw = dump_statistics({"patch": good}, {})
    tensors = {
        f"patch.{field}": np.asarray(getattr(good, field))
        for field in ("count", "mean", "centre", "variance", "covariance", "zeros")
    }
    broken = [
        b"",
        raw[:-1],
        raw[:40],
        save(tensors),
        save(tensors, {"kpu": "not JSON"}),
        save({k: v for k, v in tensors.items() if k != "patch.mean"}, {"kpu": "{}"}),
        save({**tensors, "patch.mean": np.zeros(4)}, {"kpu": "{}"}),
        save({**tensors, "patch.variance": np.zeros(3, np.float32)}, {"kpu": "{}"}),
        save({**tensors, "patch.centre": np.array([0.0, np.nan, 0.0])}, {"kpu": "{}"}),
        save({**tensors, "patch.count": np.array(0)}, {"kpu": "{}"}),
        save({**tensors, "patch.zeros": np.array(1.1)}, {"kpu": "{}"}),
    ]
    for bad in broken:
        with pytest.raises(CorruptError) as hit:
            load_statistics(bad, "t/stats.safetensors")
        assert hit.value.file == "t/stats.safetensors"
