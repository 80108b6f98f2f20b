"""Losses against hand-worked cases and float64 numpy; the resize against torch's own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kpu.errors import MismatchError
from trainer.objective.losses import (
    covariance_term,
    pair_loss,
    resize_map,
    row_loss,
    variance_term,
    weighted_mean,
    weighted_moments,
)
from trainer.sections import LossConfig

COSINE = LossConfig(cosine=1, smooth_l1=0)
SMOOTH = LossConfig(cosine=0, smooth_l1=1)
SQUARED = LossConfig(cosine=0, smooth_l1=0, mse=1)
MIXED = LossConfig(cosine=0.9, smooth_l1=0.1, mse=0.3)


def test_hand_worked() -> None:
    p, q = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])
    assert pair_loss(p, q, COSINE).item() == pytest.approx(1 - 9 / 15)
    assert pair_loss(p, q, SMOOTH).item() == pytest.approx((0 + 3.5) / 2)
    assert pair_loss(p, q + 0.5, SMOOTH).item() == pytest.approx((0.125 + 3.0) / 2)
    assert pair_loss(p, q, SQUARED).item() == pytest.approx(16 / 2)
    assert pair_loss(p, q, LossConfig()).item() == pytest.approx(0.5 * 0.4 + 0.5 * 1.75)


def test_maps_against_float64() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(0, 2, (2, 5, 7, 9))
    cosine = (p * q).sum(-1) / np.sqrt((p**2).sum(-1) * (q**2).sum(-1))
    d = np.abs(p - q)
    smooth = np.where(d < 1, d**2 / 2, d - 0.5).mean(-1)
    expected = 0.9 * (1 - cosine) + 0.1 * smooth + 0.3 * (d**2).mean(-1)
    p_BTC, q_BTC = torch.tensor(p, dtype=torch.float32), torch.tensor(q, dtype=torch.float32)
    np.testing.assert_allclose(pair_loss(p_BTC, q_BTC, MIXED), expected, rtol=1e-5)
    np.testing.assert_allclose(row_loss(p_BTC, q_BTC, MIXED), expected.mean(1), rtol=1e-5)
    np.testing.assert_allclose(row_loss(p_BTC[:, 0], q_BTC[:, 0], MIXED), expected[:, 0], rtol=1e-5)


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-4])
def test_zero_vectors_have_bounded_gradients(length: float) -> None:
    p = torch.full((1, 4), length, requires_grad=True)
    q = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    loss = pair_loss(p, q, COSINE)
    loss.sum().backward()
    assert p.grad is not None and p.grad.isfinite().all() and p.grad.norm() <= 1000.1
    assert 0 <= loss.item() <= 1
    assert pair_loss(torch.zeros(4), torch.zeros(4), COSINE).item() == 1


def test_float32_inside_whatever_comes_in() -> None:
    p = torch.tensor([[1.0, 1 / 3]]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = pair_loss(p, torch.zeros(1, 2), SQUARED)
    assert loss.dtype == torch.float32
    assert loss.item() == (1 + float(p[0, 1]) ** 2) / 2


def test_shapes_must_agree() -> None:
    with pytest.raises(MismatchError, match=r"\[2, 3\] and \[2, 1\]"):
        pair_loss(torch.zeros(2, 3), torch.zeros(2, 1), SMOOTH)


def test_weighted_mean() -> None:
    loss_B = torch.tensor([1.0, 2.0, 1e30])
    assert weighted_mean(loss_B, torch.tensor([1.0, 3.0, 0.0])).item() == 7 / 4
    assert weighted_mean(loss_B, torch.zeros(3)).item() == 0


@pytest.mark.parametrize(("grid", "to"), [((4, 4), (7, 9)), ((8, 6), (3, 3)), ((5, 4), (3, 8)), ((3, 3), (3, 5))])
def test_resize_is_torchs(grid: tuple[int, int], to: tuple[int, int]) -> None:
    x = torch.randn(2, grid[0] * grid[1], 3, generator=torch.Generator().manual_seed(0))
    image = x.reshape(2, *grid, 3).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size=to, mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(resize_map(x, grid, to), expected.permute(0, 2, 3, 1).flatten(1, 2))


def test_resize_by_hand() -> None:
    x = torch.tensor([0.0, 4.0]).reshape(1, 2, 1)
    assert resize_map(x, (1, 2), (1, 4)).flatten().tolist() == [0, 1, 3, 4]
    assert resize_map(x, (1, 2), (1, 1)).item() == 2
    assert resize_map(x, (1, 2), (1, 2)) is x


def test_resize_keeps_its_type_and_carries_gradients_after_inference() -> None:
    with torch.inference_mode():
        resize_map(torch.zeros(1, 11, 1), (11, 1), (13, 1))
    x = torch.ones(1, 11, 1, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        resized = resize_map(x, (11, 1), (13, 1))
    assert resized.dtype == torch.bfloat16
    resized.sum().backward()
    assert x.grad is not None and x.grad.sum().item() == pytest.approx(13, rel=0.01)
    with pytest.raises(MismatchError, match="expected 6 tokens for the grid 2 x 3, found 5"):
        resize_map(torch.zeros(1, 5, 1), (2, 3), (3, 3))


def weighted(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, np.ndarray]:
    """Rows of which two are masked and hold junk, their weights, and the vectors that count in float64."""
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, shape) @ rng.normal(0, 1, (shape[-1], shape[-1])) + 3
    weight = np.ones(shape[0])
    weight[[1, 4]] = 0
    x[weight == 0] = 1e4
    kept = x[weight > 0].reshape(-1, shape[-1])
    return torch.tensor(x, dtype=torch.float32), torch.tensor(weight, dtype=torch.float32), kept


@pytest.mark.parametrize("shape", [(9, 4), (9, 6, 4)])
def test_moments_and_covariance_leave_masked_rows_out(shape: tuple[int, ...]) -> None:
    x, weight_B, kept = weighted(shape)
    mean, variance = weighted_moments(x, weight_B)
    np.testing.assert_allclose(mean, kept.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, kept.var(0), rtol=1e-5)
    covariance = np.cov(kept.T, bias=True)
    expected = (covariance**2).sum() - (np.diag(covariance) ** 2).sum()
    assert covariance_term(x, weight_B).item() == pytest.approx(expected / 4, rel=1e-4)
    nothing = torch.zeros(9)
    assert [*weighted_moments(x, nothing)[1]] == [0] * 4 and covariance_term(x, nothing).item() == 0


def test_variance_term_by_hand() -> None:
    assert variance_term(torch.tensor([0.25 - 1e-4, 4.0, 0.0])).item() == pytest.approx((0.5 + 0 + 0.99) / 3)
