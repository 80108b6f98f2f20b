"""Targets and back; PHI-S against its definition; running statistics."""

from typing import Any

import numpy as np
import pytest
import torch

from kpu.errors import ConfigError
from kpu.format.statistics import Accumulator, Statistics
from trainer.objective.normalize import UnitVariance, hadamard, make_normalizer, random_orthogonal


def sample(channels: int, rows: int = 4000, dead: bool = False) -> tuple[np.ndarray, Statistics]:
    """Correlated features y [rows, channels] of very different scales, and their statistics."""
    rng = np.random.default_rng(channels)
    y = (
        rng.normal(size=(rows, channels)) @ rng.normal(size=(channels, channels)) * np.exp(rng.normal(0, 1, channels))
        + 5
    )
    if dead:
        y[:, 0] = 2.5
    accumulator = Accumulator(channels)
    accumulator.update(y)
    return y, accumulator.finish(0.05)


def standardise(y: np.ndarray, stats: Statistics) -> torch.Tensor:
    return torch.tensor((y - stats.centre) / stats.std, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["standardize", "raw", "phi-s"])
@pytest.mark.parametrize("channels", [8, 12, 9])
@pytest.mark.parametrize("dead", [False, True])
def test_round_trips(kind: Any, channels: int, dead: bool) -> None:
    y, stats = sample(channels, dead=dead)
    x = standardise(y, stats)
    normalizer = make_normalizer(kind, stats, 3)
    target = normalizer(x)
    scale = float(np.abs(y).max())
    np.testing.assert_allclose(normalizer.raw(target), y, atol=1e-5 * scale)
    live = slice(1, None) if dead else slice(None)  # a dead channel's floored scale magnifies float32's rounding
    np.testing.assert_allclose(normalizer.standardised(target)[:, live], x[:, live], atol=1e-3)


def test_standardize_is_the_identity_and_raw_is_the_teachers_own() -> None:
    y, stats = sample(5)
    x = standardise(y, stats)
    assert make_normalizer("standardize", stats, 0)(x) is x
    np.testing.assert_allclose(make_normalizer("raw", stats, 0)(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [16, 12, 9])
def test_phi_s_is_what_the_paper_says(channels: int) -> None:
    y, stats = sample(channels)
    target = make_normalizer("phi-s", stats, 0)(standardise(y, stats)).double().numpy()
    covariance = np.cov(target.T, bias=True)
    assert np.diag(covariance).mean() == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(target.mean(0), 0, atol=1e-4)
    # A rotation and one scale: the spectrum keeps its shape.
    spectrum = np.linalg.eigvalsh(stats.covariance)
    np.testing.assert_allclose(np.linalg.eigvalsh(covariance), spectrum / spectrum.mean(), rtol=1e-3, atol=1e-4)
    if channels != 9:
        np.testing.assert_allclose(np.diag(covariance), 1, rtol=1e-4)
    else:
        assert np.ptp(np.diag(covariance)) > 0.1


def test_phi_s_refuses_too_few_rows() -> None:
    _, stats = sample(8, rows=79)
    with pytest.raises(ConfigError, match=r"targets\.normalize: .* 80 vectors .* for dino global, found 79"):
        make_normalizer("phi-s", stats, 0, name="dino global")
    make_normalizer("phi-s", sample(8, rows=80)[1], 0)


def test_phi_s_of_an_output_that_never_varies() -> None:
    accumulator = Accumulator(2)
    accumulator.update(np.full((30, 2), 7.0))
    stats = accumulator.finish(0.05)
    assert make_normalizer("phi-s", stats, 0)(torch.zeros(1, 2)).isfinite().all()


def test_phi_s_is_read_back_from_the_state() -> None:
    y, stats = sample(9)
    first, other = make_normalizer("phi-s", stats, 1), make_normalizer("phi-s", stats, 2)
    x = standardise(y, stats)
    assert not torch.allclose(first(x), other(x))
    other.load_state_dict(first.state_dict())
    assert torch.equal(first(x), other(x))


@pytest.mark.parametrize("order", [1, 2, 64, 12, 24, 20, 44, 384, 768])
def test_hadamard(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(order), atol=1e-12)
    np.testing.assert_allclose(np.abs(matrix), order**-0.5)


def test_no_hadamard_then_a_seeded_rotation() -> None:
    assert [order for order in range(1, 40) if hadamard(order) is None and order % 4 == 0] == [28, 36]
    assert hadamard(9) is None and hadamard(6) is None
    matrix = random_orthogonal(9, 5)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(9), atol=1e-12)
    np.testing.assert_array_equal(matrix, random_orthogonal(9, 5))
    assert not np.allclose(matrix, random_orthogonal(9, 6))


def test_unit_variance_by_the_batch_then_by_running_statistics() -> None:
    norm = UnitVariance(3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, 3, generator=generator) * torch.tensor([0.1, 1.0, 7.0]) + 2
    weight_B = torch.ones(50)
    weight_B[:10], x[:10] = 0, 1e4
    kept = x[10:].double().flatten(0, 1)
    normal, variance = norm(x, weight_B)
    kept_normal = normal[10:].double().flatten(0, 1)
    np.testing.assert_allclose(kept_normal.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(kept_normal.var(0, correction=0), 1, rtol=2e-3)
    np.testing.assert_allclose(variance, kept.var(0, correction=0), rtol=1e-4)
    np.testing.assert_allclose(norm.variance, variance, rtol=1e-6)  # the first batch counts whole
    norm(torch.zeros(50, 3), torch.zeros(50))
    np.testing.assert_allclose(norm.variance, variance, rtol=1e-6)  # a batch without rows moves nothing
    norm(torch.zeros(50, 3), torch.ones(50))
    np.testing.assert_allclose(norm.variance, variance / 2, rtol=1e-6)
    before = norm.variance.clone()
    assert torch.equal(norm(x, None)[1], before)
    norm.frozen = True
    assert torch.equal(norm(x, weight_B)[1], before) and torch.equal(norm.variance, before)
