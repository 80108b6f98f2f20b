"""The error bound of `uniform`, exact zeros, the float codecs, and what is too large for each."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kpu.errors import CorruptError, MismatchError
from kpu.format.codecs import FOLDED_LIMIT, LIMIT, MASKED, QuantGrid, calibrated, fold, make_grid, unfold
from kpu.format.fidelity import measure
from kpu.format.statistics import Accumulator, Statistics
from kpu.format.teacher import CodecSpec
from kpu.shards.layout import ArrayLayout
from kpu.shards.writer import encode_shard

UNIFORM = CodecSpec()
ROTATED = CodecSpec(name="rotated")
CODECS = [UNIFORM, ROTATED, *(CodecSpec(name=name) for name in ("fp32", "fp16", "bf16"))]  # type: ignore[arg-type]


def statistics_of(features: np.ndarray[Any, Any], step: float = 0.05) -> Statistics:
    accumulator = Accumulator(features.shape[-1])
    accumulator.update(features.reshape(-1, features.shape[-1]))
    return calibrated(accumulator, CodecSpec(name="rotated", step=step))


def statistics(mean: list[float], std: list[float], step: float = 0.05) -> Statistics:
    """Statistics with exactly these moments."""
    accumulator = Accumulator(len(mean))
    accumulator.add(2, np.array(mean), 2 * np.diag(np.square(std)))
    return calibrated(accumulator, CodecSpec(name="rotated", step=step))


def synthetic_features(rows: int, seed: int = 0, tail: float | None = 4) -> np.ndarray[Any, Any]:
    """[rows, 197, 384]: heavy-tailed (Student's t; Gaussian for None), 2% outlier tokens, unequal channels."""
    rng = np.random.default_rng(seed)
    shape = (rows, 197, 384)
    x = rng.standard_normal(shape) if tail is None else rng.standard_t(tail, shape)
    x *= np.exp(rng.normal(0, 1, 384))
    x += rng.normal(0, 1, 384)
    x[rng.random(shape[:2]) < 0.02] *= 10
    return x.astype(np.float32)


moderate = st.floats(-1e4, 1e4, width=32)
spreads = st.floats(2**-10, 2**10, width=32)


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 8), st.just(3)), elements=moderate),
    st.lists(moderate, min_size=3, max_size=3),
    st.lists(spreads, min_size=3, max_size=3),
    st.sampled_from([0.01, 0.05, 0.1, 0.2]),
)
def test_uniform_is_within_half_a_step_or_saturated(
    features: np.ndarray[Any, Any], mean: list[float], std: list[float], step: float
) -> None:
    grid = make_grid(CodecSpec(step=step), statistics(mean, std, step))
    stored = grid.encode(features)
    decoded = grid.decode(stored).astype(np.float64)
    exact, centre, scale = (array.astype(np.float64) for array in (features, grid.centre, grid.scale))

    ulp = 2.0**-23 * np.maximum(np.abs(exact), np.maximum(np.abs(centre), np.abs(exact - centre)))
    steps = (exact - centre) / scale
    slack = 2 * ulp / scale
    inside, outside = np.abs(steps) < LIMIT + 0.5 - slack, np.abs(steps) > LIMIT + 0.5 + slack
    saturated = grid.saturated(features)
    assert not saturated[inside].any()
    assert saturated[outside].all()
    assert (np.abs(decoded - exact) <= scale / 2 + 4 * ulp)[~saturated].all()
    assert (np.abs(stored.astype(int)) <= LIMIT).all()
    assert (stored[saturated] == np.where(steps > 0, LIMIT, -LIMIT)[saturated]).all()


@settings(max_examples=150, deadline=None)
@given(st.lists(moderate, min_size=1, max_size=20), st.data(), st.sampled_from([0.01, 0.05, 0.1, 0.3]))
def test_a_raw_zero_stays_exactly_zero(mean: list[float], data: st.DataObject, step: float) -> None:
    std = data.draw(st.lists(spreads, min_size=len(mean), max_size=len(mean)))
    grid = make_grid(CodecSpec(step=step), statistics(mean, std, step))
    zeros = np.zeros((2, len(mean)), np.float32)
    inside = ~grid.saturated(zeros)
    assert (grid.decode(grid.encode(zeros))[inside] == 0.0).all()


def test_rounding_is_half_to_even() -> None:
    grid = QuantGrid(UNIFORM, np.zeros(1, np.float32), np.ones(1, np.float32), np.zeros(1, np.int32))
    halves = np.array([[-2.5], [-1.5], [-0.5], [0.5], [1.5], [2.5], [32767.4], [32767.6], [-40000]], np.float32)
    assert grid.encode(halves).ravel().tolist() == [-2, -2, 0, 0, 2, 2, 32767, 32767, -32767]
    assert grid.saturated(halves).ravel().tolist() == [False] * 7 + [True] * 2


def test_integers_are_counted_from_far_below_the_mean() -> None:
    stats = statistics([0.1, -300.0, 1e-3], [0.3, 2.2, 1e-5])
    grid = make_grid(UNIFORM, stats)
    means = stats.mean[None].astype(np.float32)
    assert grid.encode(means).tolist() == [[128, 128, 128]]
    np.testing.assert_array_equal(grid.middle, stats.centre.astype(np.float32))
    near = (stats.mean + np.linspace(-6, 6, 25)[:, None] * stats.std).astype(np.float32)
    stored = grid.encode(near)
    assert stored.min() >= 0 and stored.max() <= 255
    targets = 0.05 * (stored - grid.offset)
    np.testing.assert_allclose(targets, (near - stats.centre) / stats.std, atol=0.0251)


def test_where_many_values_are_zero_all_zeros_are_stored_alike() -> None:
    rng = np.random.default_rng(0)
    features = np.maximum(rng.normal(size=(64, 64, 16)) * np.geomspace(0.01, 100, 16), 0).astype(np.float32)
    features[..., 3] = 1e5 + rng.normal(size=(64, 64))  # no zero is anywhere near
    stats = statistics_of(features)
    assert stats.zeros == pytest.approx((features == 0).mean())
    grid = make_grid(UNIFORM, stats)
    stored = grid.encode(features)
    assert set(stored[features == 0].tolist()) == {16}
    assert np.abs(stored[..., 3] - 128).max() < 200
    few = statistics_of(np.where(rng.random(features.shape) < 0.05, 0, features + 1).astype(np.float32))
    assert (make_grid(UNIFORM, few).offset == 128).all()


def test_zero_based_features_keep_their_zeros() -> None:
    features = np.maximum(np.random.default_rng(0).normal(size=(64, 64, 16)), 0).astype(np.float32)
    grid = make_grid(UNIFORM, statistics_of(features))
    assert (grid.decode(grid.encode(features))[features == 0] == 0).all()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_the_fill_decodes_to_nan_and_nan_encodes_to_a_fill(codec: CodecSpec) -> None:
    grid = make_grid(codec, statistics([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]))
    filled = np.full((2, 3), grid.fill, grid.dtype)
    assert np.isnan(grid.decode(filled)).all()
    for features in np.array([[[1.0, np.nan, 2.0]], [[np.nan, 1.0, 2.0]]], np.float32):
        missing = np.isnan(features)
        if codec.name == "rotated":
            missing |= missing.any(-1, keepdims=True)
        np.testing.assert_array_equal(np.isnan(grid.decode(grid.encode(features))), missing)
        assert not grid.saturated(features).any()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_shapes_dtypes_and_input_are_kept(codec: CodecSpec) -> None:
    features = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    before = features.copy()
    grid = make_grid(codec, statistics_of(features))
    stored = grid.encode(features)
    assert (stored.shape, stored.dtype) == (features.shape, grid.dtype)
    decoded = grid.decode(stored)
    assert (decoded.shape, decoded.dtype) == (features.shape, np.float32)
    assert grid.saturated(features).shape == features.shape
    np.testing.assert_array_equal(features, before)
    np.testing.assert_array_equal(grid.encode(features[:, ::2]), stored[:, ::2])
    assert grid.packing == {"uniform": "bytes", "rotated": "bits"}.get(codec.name, "plain")


def test_fp32_is_exact() -> None:
    features = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    grid = make_grid(CodecSpec(name="fp32"), statistics_of(features))
    np.testing.assert_array_equal(grid.decode(grid.encode(features)), features)


@settings(max_examples=150, deadline=None)
@given(hnp.arrays(np.float32, 8, elements=st.floats(width=32, allow_nan=False)))
def test_bf16_rounds_as_others_do(values: np.ndarray[Any, Any]) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    grid = make_grid(CodecSpec(name="bf16"), statistics([0.0] * 8, [1.0] * 8))
    largest = np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    expected = np.clip(values, -largest, largest).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(grid.encode(values), expected.view(np.uint16))
    np.testing.assert_array_equal(grid.decode(grid.encode(values)), expected.astype(np.float32))
    np.testing.assert_array_equal(grid.saturated(values), np.abs(values) > largest)


def test_fp16_clips_to_its_finite_range() -> None:
    grid = make_grid(CodecSpec(name="fp16"), statistics([0.0], [1.0]))
    values = np.array([[1e5], [-7e4], [65504.0], [1e-8], [3.14159]], np.float32)
    assert grid.decode(grid.encode(values)).ravel().tolist() == [65504.0, -65504.0, 65504.0, 0.0, 3.140625]
    assert grid.saturated(values).ravel().tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("tokens", [None, (14, 14)])
def test_attributes_say_everything_and_come_back_exactly(codec: CodecSpec, tokens: tuple[int, int] | None) -> None:
    grid = make_grid(codec, statistics([0.1, -3.7, 1e-3], [0.3, 2.2, 1e-5]))
    attributes = grid.attributes(tokens)
    extra = ["axes"] if codec.name == "rotated" else []
    assert list(attributes) == ["codec", "step", "centre", "scale", "offset", "grid", *extra]
    again, found_tokens = QuantGrid.from_attributes(attributes, "f")
    assert found_tokens == tokens
    assert again.codec == codec
    np.testing.assert_array_equal(again.centre, grid.centre)
    np.testing.assert_array_equal(again.scale, grid.scale)
    np.testing.assert_array_equal(again.offset, grid.offset)
    np.testing.assert_array_equal(again.middle, grid.middle)
    assert (again.axes is None) == (grid.axes is None)
    if again.axes is not None:
        np.testing.assert_array_equal(again.axes, grid.axes)


@pytest.mark.parametrize(
    "change",
    [
        {"codec": "zip"},
        {"step": None, "codec": "fp16", "scale": [1.0, 1.0]},
        {"centre": [[0.0]]},
        {"centre": [float("nan")]},
        {"scale": [0.0]},
        {"scale": [float("inf")]},
        {"scale": ["x"]},
        {"offset": [1, 2]},
        {"offset": [2**40]},
        {"offset": None},
        {"grid": 3},
    ],
)
def test_broken_attributes_are_refused(change: dict[str, Any]) -> None:
    attributes = make_grid(UNIFORM, statistics([0.5], [1.0])).attributes((1, 1))
    with pytest.raises(CorruptError, match=r"^t/patch/zarr\.json: attribute kpu"):
        QuantGrid.from_attributes({**attributes, **change}, "t/patch/zarr.json")


@pytest.mark.parametrize("axes", [None, 3, "?", "", "AACAPw==", "AAAAAAAAgD8AAIA/AACAPw=="])
def test_broken_axes_are_refused(axes: Any) -> None:
    attributes = make_grid(ROTATED, statistics([0.5, 0.0], [1.0, 1.0])).attributes((1, 1))
    for change in ({**attributes, "axes": axes}, {key: attributes[key] for key in attributes if key != "axes"}):
        with pytest.raises(CorruptError, match=r"^t/patch/zarr\.json: attribute kpu"):
            QuantGrid.from_attributes(change, "t/patch/zarr.json")


def test_axes_by_hand() -> None:
    """Two channels with correlation .6: the axes are the diagonals, with variances 1.6 and .4."""
    moments = Accumulator(2)
    moments.add(100, np.array([1.0, -2.0]), 100 * np.array([[4.0, 0.6 * 2 * 3], [0.6 * 2 * 3, 9.0]]))
    grid = make_grid(CodecSpec(name="rotated", step=0.5), calibrated(moments, CodecSpec(name="rotated", step=0.5)))
    half = np.sqrt(0.5)
    assert grid.axes is not None
    np.testing.assert_allclose(np.abs(grid.axes), [[half, half], [half, half]], rtol=1e-6)
    np.testing.assert_allclose(grid.axes[0], [half, half], rtol=1e-6)
    np.testing.assert_allclose(grid.scale, [1.0, 1.5])
    # Standardised (1, 1) is sqrt(2) = 2.83 steps of .5 along the first axis: 3 steps, stored as 6.
    features = (grid.centre + np.array([[2.0, 3.0]])).astype(np.float32)
    stored = grid.encode(features)
    assert stored.tolist() == [[6, 0]]
    np.testing.assert_allclose(grid.decode(stored), grid.centre[None] + 1.5 * half * np.array([[2, 3]]), rtol=1e-6)
    assert grid.encode(2 * grid.centre - features).tolist() == [[5, 0]]


def test_folding_keeps_small_steps_small_and_every_step_apart() -> None:
    steps = np.arange(-FOLDED_LIMIT, FOLDED_LIMIT + 1, dtype=np.int16)
    stored = fold(steps)
    assert fold(np.array([0, -1, 1, -2, 2], np.int16)).tolist() == [0, 1, 2, 3, 4]
    assert stored.min() == 0 and len(np.unique(stored)) == len(steps)
    np.testing.assert_array_equal(unfold(stored), steps)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, (4, 6), elements=moderate), st.integers(0, 99), st.sampled_from([0.02, 0.05, 0.2]))
def test_the_error_of_a_rotated_vector_is_within_half_a_step_or_it_saturates(
    features: np.ndarray[Any, Any], seed: int, step: float
) -> None:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) * np.exp(rng.normal(0, 2, 6))
    stats = statistics_of(mixed.astype(np.float32), step)
    grid = make_grid(CodecSpec(name="rotated", step=step), stats)
    exact = (features.astype(np.float64) - stats.centre) / stats.std
    error = (grid.decode(grid.encode(features)).astype(np.float64) - stats.centre) / stats.std - exact
    inside = ~grid.saturated(features).any(-1)
    largest = np.abs(exact).max(-1) + np.abs(stats.centre / stats.std).max()  # float32 rounds in units of these
    bound = step / 2 * (1 + 1e-4) + 1e-5 * largest
    assert (np.sqrt(np.mean(error**2, axis=-1)) <= bound)[inside].all()


def test_a_rotation_makes_correlated_features_smaller_at_the_same_error() -> None:
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(64, 100, 16)) @ rng.normal(size=(16, 48))).astype(np.float32)
    features += 0.2 * rng.normal(size=features.shape).astype(np.float32)
    stats = statistics_of(features)
    sizes, errors = {}, {}
    for codec in (UNIFORM, ROTATED):
        grid = make_grid(codec, stats)
        stored = grid.encode(features)
        layout = ArrayLayout(64, 64, 1, features.shape[1:], grid.dtype, MASKED, grid.packing)
        sizes[codec.name] = len(encode_shard(stored, layout, 0).data)
        fidelity = measure(features, grid.decode(stored), grid.saturated(features), stats)
        errors[codec.name] = np.sqrt(fidelity.squared_error.mean())
    assert sizes["rotated"] < 0.7 * sizes["uniform"]
    assert errors["rotated"] == pytest.approx(errors["uniform"], rel=0.02)


def test_a_calibration_without_axes_is_refused() -> None:
    moments = Accumulator(2)
    moments.add(2, np.zeros(2), np.eye(2))
    with pytest.raises(MismatchError, match="with axes"):
        make_grid(ROTATED, calibrated(moments, UNIFORM))


def test_statistics_snapped_to_another_step_are_refused() -> None:
    with pytest.raises(MismatchError, match=r"step 0\.1"):
        make_grid(CodecSpec(step=0.1), statistics([0.73], [1.0], step=0.05))


@pytest.mark.parametrize("tail", [3, 4, 6], ids=lambda tail: f"t{tail}")
@pytest.mark.parametrize("kind", ["patch", "global"])
def test_heavy_tailed_features_are_small_and_close(kind: str, tail: float) -> None:
    if kind == "patch":
        features, chunk_rows = synthetic_features(48, tail=tail), 1
    else:
        features, chunk_rows = synthetic_features(16, tail=tail).reshape(-1, 384)[: 64 * 32], 64
    stats = statistics_of(features)
    grid = make_grid(UNIFORM, stats)
    stored = grid.encode(features)
    rows = len(features)
    layout = ArrayLayout(rows, rows, chunk_rows, features.shape[1:], grid.dtype, MASKED, grid.packing)
    size = len(encode_shard(stored, layout, 0).data) / (2 * features.size)
    fidelity = measure(features, grid.decode(stored), grid.saturated(features), stats)
    assert size <= 0.45
    assert np.sqrt(fidelity.squared_error.mean()) <= 0.0145
    assert fidelity.saturated.sum() == 0
