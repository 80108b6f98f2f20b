"""Quantising on the device: the bits of the reference codec, the costs of the reference measure."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kpu.format import codecs
from kpu.format.codecs import MASKED, QuantGrid, make_grid
from kpu.format.fidelity import measure
from kpu.format.statistics import Accumulator, Statistics, snap
from kpu.format.teacher import DEFAULT_STEP, CodecSpec
from pipeline.worker.quantise import DeviceGrid

Codec = Literal["uniform", "fp32", "fp16", "bf16"]
CODECS: Sequence[Codec] = ("uniform", "fp32", "fp16", "bf16")
CHANNELS = 24


def calibrated(codec: Codec | Literal["rotated"], x: np.ndarray) -> tuple[QuantGrid, Statistics]:
    accumulator = Accumulator(x.shape[-1])
    accumulator.update(x.reshape(-1, x.shape[-1]))
    spec = CodecSpec(name=codec)
    statistics = codecs.calibrated(accumulator, spec)
    return make_grid(spec, statistics), statistics


def check_rotated(grid: QuantGrid, statistics: Statistics, x: np.ndarray) -> None:
    """As `check`, where the two products may round differently, and what lies between two steps goes either way."""
    found = DeviceGrid(grid, statistics, "cpu").encode(torch.from_numpy(x))
    with np.errstate(invalid="ignore", over="ignore"):
        expected, saturated = grid.encode(x), grid.saturated(x)
    finite = np.isfinite(x).reshape(len(x), -1).all(1)
    np.testing.assert_array_equal(found.finite.numpy(), finite)
    stored = found.stored.numpy()
    apart = np.abs(grid.steps(stored).astype(int) - grid.steps(expected))[finite]
    assert apart.max() <= 1 and np.count_nonzero(apart) <= max(2, 1e-3 * apart.size)
    np.testing.assert_array_equal(stored == MASKED, expected == MASKED)
    with np.errstate(invalid="ignore", over="ignore"):
        reference = measure(x, grid.decode(stored), saturated, statistics)
    np.testing.assert_array_equal(found.saturated.numpy()[finite], reference.saturated[finite])
    errors, cosines = found.squared_error.numpy()[finite], found.cosine.numpy()[finite]
    np.testing.assert_allclose(errors, reference.squared_error[finite], rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(cosines, reference.cosine[finite], rtol=0, atol=1e-6)


def heavy_tailed(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(size=shape[-1]))
    return ((rng.standard_t(3, size=shape) + rng.normal(size=shape[-1])) * scale).astype(np.float32)


def check(codec: Codec, grid: QuantGrid, statistics: Statistics, x: np.ndarray) -> None:
    """Compare with the reference; rows that are not finite have no cost."""
    found = DeviceGrid(grid, statistics, "cpu").encode(torch.from_numpy(x))
    with np.errstate(invalid="ignore", over="ignore"):
        expected, saturated = grid.encode(x), grid.saturated(x)
    assert found.stored.numpy().dtype == grid.dtype
    np.testing.assert_array_equal(found.stored.numpy(), expected)
    finite = np.isfinite(x).reshape(len(x), -1).all(1)
    np.testing.assert_array_equal(found.finite.numpy(), finite)
    with np.errstate(invalid="ignore", over="ignore"):
        reference = measure(x, grid.decode(expected), saturated, statistics)
    np.testing.assert_array_equal(found.saturated.numpy()[finite], reference.saturated[finite])
    errors, cosines = found.squared_error.numpy()[finite], found.cosine.numpy()[finite]
    relative = 5e-5 if codec == "uniform" else 1e-3  # the errors of fp16 are themselves near the last bit of float32
    np.testing.assert_allclose(errors, reference.squared_error[finite], rtol=relative, atol=1e-12)
    np.testing.assert_allclose(cosines, reference.cosine[finite], rtol=0, atol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(5, CHANNELS), (3, 7, CHANNELS), (3, 2000, CHANNELS), (1, 5, 1)])
def test_equal_to_the_reference(codec: Codec, shape: tuple[int, ...]) -> None:
    x = heavy_tailed(*shape)
    check(codec, *calibrated(codec, heavy_tailed(50, shape[-1])), x)


@pytest.mark.parametrize("codec", CODECS)
def test_vectors_longer_than_a_block(codec: Codec) -> None:
    x = heavy_tailed(2, 40_000)
    mean, variance = x.mean(0).astype(np.float64), np.full(40_000, 4.0)
    spec = CodecSpec(name=codec)
    centre, _ = snap(mean, np.sqrt(variance), spec.step or DEFAULT_STEP)
    statistics = Statistics(2, mean, centre.astype(np.float64), variance, np.empty((0, 0)))
    check(codec, make_grid(spec, statistics), statistics, x)


@pytest.mark.parametrize("codec", CODECS)
def test_values_out_of_range_saturate_and_are_counted(codec: Codec) -> None:
    x = heavy_tailed(6, 3, CHANNELS)
    grid, statistics = calibrated(codec, x)
    x[1, 2, 3], x[1, 0, 0] = 1e9, -1e9
    x[3, 0, 5] = 3e38
    x[4] = 0
    check(codec, grid, statistics, x)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_found(codec: Codec, value: float) -> None:
    x = heavy_tailed(4, 3, CHANNELS)
    grid, statistics = calibrated(codec, x)
    x[2, 1, 7] = value
    check(codec, grid, statistics, x)
    found = DeviceGrid(grid, statistics, "cpu").encode(torch.from_numpy(x))
    assert found.finite.tolist() == [True, True, False, True]


@pytest.mark.parametrize("shape", [(5, CHANNELS), (3, 7, CHANNELS), (3, 2000, CHANNELS), (1, 5, 1)])
def test_rotated_is_near_the_reference(shape: tuple[int, ...]) -> None:
    check_rotated(*calibrated("rotated", heavy_tailed(50, shape[-1])), heavy_tailed(*shape))


@pytest.mark.parametrize("value", [1e9, -3e38, np.nan, np.inf])
def test_rotated_bears_what_is_large_or_missing(value: float) -> None:
    x = heavy_tailed(6, 3, CHANNELS)
    grid, statistics = calibrated("rotated", x)
    x[1, 2, 3], x[4] = value, 0
    check_rotated(grid, statistics, x)


@pytest.mark.parametrize("codec", [*CODECS, "rotated"])
def test_unusual_tokens_are_encoded_in_blocks_as_if_alone(
    codec: Codec | Literal["rotated"], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.from_numpy(heavy_tailed(2, 150, CHANNELS))
    device_grid = DeviceGrid(*calibrated(codec, x.numpy()), "cpu")
    x *= 1e38
    blocks: list[int] = []
    encode_any = device_grid._encode_any

    def noted(x_ND: torch.Tensor, *arguments: Any) -> Any:
        blocks.append(len(x_ND))
        return encode_any(x_ND, *arguments)

    monkeypatch.setattr(device_grid, "_encode_any", noted)
    together = device_grid.encode(x)
    assert len(blocks) == 1 and blocks[0] > 100
    alone = [device_grid.encode(token.view(1, 1, -1)) for token in x.view(-1, CHANNELS)]
    bits = torch.cat([token.stored.view(-1, CHANNELS) for token in alone]).view(torch.uint8)
    assert torch.equal(together.stored.view(-1, CHANNELS).view(torch.uint8), bits)
    assert torch.equal(together.saturated, torch.cat([token.saturated for token in alone]).view(2, -1).sum(1))
    errors, cosines = (
        torch.stack([getattr(token, cost)[0] for token in alone]).view(2, -1).mean(1)
        for cost in ("squared_error", "cosine")
    )
    torch.testing.assert_close(together.squared_error, errors, rtol=1e-12, atol=0, equal_nan=True)
    torch.testing.assert_close(together.cosine, cosines, rtol=1e-12, atol=0, equal_nan=True)


def test_halves_round_to_even_as_in_numpy() -> None:
    grid, statistics = calibrated("uniform", heavy_tailed(50, CHANNELS))
    steps = np.arange(-40, 40, dtype=np.float32)[:, None] / 2 + np.float32([[0] * (CHANNELS - 1) + [1]])
    check("uniform", grid, statistics, grid.middle + steps * grid.scale)


@given(
    hnp.arrays(
        np.float32,
        (3, 2, 4),
        elements=st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=False),
    ),
    st.sampled_from(CODECS),
)
@settings(max_examples=60, deadline=None)
def test_any_bits_give_the_reference_bits(x: np.ndarray, codec: Codec) -> None:
    grid, statistics = calibrated(codec, heavy_tailed(50, 4))
    found = DeviceGrid(grid, statistics, "cpu").encode(torch.from_numpy(x))
    with np.errstate(invalid="ignore", over="ignore"):
        expected = grid.encode(x)
    np.testing.assert_array_equal(found.stored.numpy(), expected)
    np.testing.assert_array_equal(found.finite.numpy(), np.isfinite(x).reshape(3, -1).all(1))


def test_writes_into_a_given_buffer_and_leaves_the_features() -> None:
    x = heavy_tailed(5, 3, CHANNELS)
    grid, statistics = calibrated("uniform", x)
    device_grid = DeviceGrid(grid, statistics, "cpu")
    unit = torch.zeros((9, 3, CHANNELS), dtype=device_grid.dtype)
    features = torch.from_numpy(x.copy())
    found = device_grid.encode(features, unit[2:7])
    assert found.stored.data_ptr() == unit[2:7].data_ptr()
    np.testing.assert_array_equal(unit[2:7].numpy(), grid.encode(x))
    assert not unit[:2].any() and not unit[7:].any()
    np.testing.assert_array_equal(features.numpy(), x)


def test_an_empty_batch() -> None:
    grid, statistics = calibrated("uniform", heavy_tailed(5, CHANNELS))
    found = DeviceGrid(grid, statistics, "cpu").encode(torch.empty((0, 3, CHANNELS)))
    assert found.stored.shape == (0, 3, CHANNELS)
    assert len(found.squared_error) == len(found.finite) == 0


def test_the_result_does_not_depend_on_threads() -> None:
    x = heavy_tailed(3, 500, CHANNELS)
    device_grid = DeviceGrid(*calibrated("uniform", x), "cpu")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(device_grid.encode(torch.from_numpy(x)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].squared_error, results[1].squared_error)
    assert torch.equal(results[0].cosine, results[1].cosine)


@pytest.mark.parametrize("codec", CODECS)
def test_single_precision_measures_as_well(codec: Codec) -> None:
    """What a GPU does with every token and the CPU with few."""
    x = heavy_tailed(200, CHANNELS)
    grid, statistics = calibrated(codec, x)
    x[3, 5], x[4] = 1e9, 0
    stored = torch.empty(x.shape, dtype=DeviceGrid(grid, statistics, "cpu").dtype)
    error, cosine, saturated, finite = DeviceGrid(grid, statistics, "cpu")._encode_any(
        torch.from_numpy(x), stored, torch.float32
    )
    reference = measure(x, grid.decode(grid.encode(x)), grid.saturated(x), statistics)
    np.testing.assert_array_equal(stored.numpy(), grid.encode(x))
    unit = (grid.codec.step or 1) ** 2 / CHANNELS
    np.testing.assert_allclose(error.numpy() * unit, reference.squared_error, rtol=2e-3, atol=1e-12)
    np.testing.assert_allclose(cosine.numpy(), reference.cosine, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(saturated.numpy(), reference.saturated)
    assert finite.all()
