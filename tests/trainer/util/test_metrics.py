"""Each measure against a hand-worked or float64 reference case."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score, r2_score

from trainer.util.metrics import R2, agreement, cohens_kappa, covariance_rank

RNG = np.random.default_rng(0)


def test_agreement_and_kappa_by_hand() -> None:
    """Cohen's table [[20, 5], [10, 15]]: 0.7 agree, 0.5 by chance."""
    a = np.repeat([0, 0, 1, 1], [20, 5, 10, 15])
    b = np.repeat([0, 1, 0, 1], [20, 5, 10, 15])
    assert agreement(a, b) == pytest.approx(0.7)
    assert cohens_kappa(a, b) == pytest.approx(0.4)


def test_kappa_is_scikit_learns() -> None:
    a = RNG.integers(-3, 9, 500)
    b = np.where(RNG.random(500) < 0.6, a, RNG.integers(0, 12, 500))
    assert cohens_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))


def test_kappa_at_its_ends() -> None:
    assert cohens_kappa(np.array([4, 7, 4]), np.array([4, 7, 4])) == 1
    assert (
        cohens_kappa(np.array([0, 0, 0, 0]), np.array([0, 1, 0, 1])) == 0
    )  # one label for all is no better than chance
    assert math.isnan(cohens_kappa(np.array([2, 2]), np.array([2, 2])))


@pytest.mark.parametrize("b", [[1], [[1, 2]], []])
def test_refuses_labels_that_do_not_pair(b: list[int]) -> None:
    for measure in (agreement, cohens_kappa):
        with pytest.raises(ValueError, match="labels"):
            measure(np.array([1, 2] if b else [], int), np.array(b, int))


def test_r2_over_batches_of_maps_is_scikit_learns() -> None:
    """With masked rows, large offsets, and channels of different scale."""
    y = RNG.normal(size=(37, 5, 4)) * [1, 10, 0.1, 1] + [0, 1000, 3, -5]
    p = y + RNG.normal(size=y.shape) * [0.5, 5, 0.1, 3]
    valid = RNG.random(37) < 0.7
    r2 = R2()
    for rows in np.array_split(np.arange(37), [1, 10, 11, 30]):
        r2.update(torch.from_numpy(p[rows]), torch.from_numpy(y[rows]), torch.from_numpy(valid[rows]))
    expected = r2_score(y[valid].reshape(-1, 4), p[valid].reshape(-1, 4), multioutput="raw_values")
    np.testing.assert_allclose(r2.channels(), expected, rtol=1e-10)
    assert r2.value() == pytest.approx(expected.mean())


def test_r2_leaves_out_dead_channels() -> None:
    """0.1 is no binary fraction: the variance of a constant must still be 0."""
    y = torch.stack([torch.full((30,), 0.1), torch.arange(30.0)], dim=1)
    p = torch.stack([torch.zeros(30), torch.arange(30.0)], dim=1)
    r2 = R2()
    for part in (slice(0, 7), slice(7, 30)):
        r2.update(p[part], y[part])
    assert math.isnan(r2.channels()[0])
    assert r2.value() == 1


def test_r2_leaves_out_channels_of_rounding_alone() -> None:
    """Noise of 0.01 where the calibration has 1: whatever is predicted, it is no part of the mean."""
    numbers = torch.Generator().manual_seed(0)
    y = torch.randn(500, 2, generator=numbers) * torch.tensor([1.0, 0.01])
    r2 = R2()
    r2.update(y + 0.1 * torch.randn(500, 2, generator=numbers), y)
    assert math.isnan(r2.channels()[1])
    assert r2.value() == pytest.approx(0.99, abs=0.003)


def test_r2_of_the_mean_is_0_and_sees_nan() -> None:
    y = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r2 = R2()
    r2.update(y.mean(0).expand(50, 3), y)
    assert r2.value() == pytest.approx(0, abs=1e-12)
    r2.update(torch.full((1, 3), torch.nan), y[:1])
    assert math.isnan(r2.value())


def test_r2_without_anything_to_measure() -> None:
    r2 = R2()
    r2.update(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2).bool())
    with pytest.raises(ValueError, match="valid row"):
        r2.value()
    r2.update(torch.ones(2, 3), torch.ones(2, 3))
    assert math.isnan(r2.value())
    with pytest.raises(ValueError, match="shape"):
        r2.update(torch.ones(2, 3), torch.ones(2, 4))


def test_covariance_rank_by_hand() -> None:
    assert covariance_rank(np.eye(5) * 3) == pytest.approx(5)
    # Shares 1/2, 1/4, 1/4: entropy 1.5 ln 2.
    rotation = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    assert covariance_rank(rotation @ np.diag([2.0, 1.0, 1.0]) @ rotation.T) == pytest.approx(2**1.5)
    assert covariance_rank(np.zeros((4, 4))) == 0
