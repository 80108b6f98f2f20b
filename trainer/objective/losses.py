"""The pair loss and its means, VICReg's terms, and the resize that brings two maps onto one grid.

Letters: B rows, T tokens, C channels, H and W the sides of a grid.
"""

from functools import lru_cache
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kpu.errors import MismatchError
from trainer.data.shapes import TokenGrid
from trainer.sections import LossConfig

SMALLEST_NORM: Final = 1e-3  # below it a vector counts as this long, so that the cosine's gradient stays below 1e3

VICREG_STD: Final = 1.0  # the standard deviation below which VICReg's variance term acts
VICREG_EPSILON: Final = 1e-4


def pair_loss(p: Tensor, q: Tensor, weights: LossConfig) -> Tensor:
    """`cosine` (1 - cos(p, q)) + `smooth_l1` SmoothL1(p, q; beta 1) + `mse` (p - q)^2, for every vector.

    Args:
        p: [..., C], any float type.
        q: [..., C], of the same shape.
        weights: weights of the parts; a part of weight 0 is not computed.

    Returns:
        float32 [...]. SmoothL1 and the squared error are means over channels. The cosine of a zero vector is 0.
        Cosine and SmoothL1 at 1/2 each are the loss of UNIC (Sariyildiz et al. 2024, arXiv 2408.05088).

    Raises:
        MismatchError: p and q differ in shape.
    """
    if p.shape != q.shape:
        raise MismatchError(
            f"loss: expected two features of one shape, found {list(p.shape)} and {list(q.shape)}; "
            "resize the map or project the channels first"
        )
    p, q = p.float(), q.float()
    loss = p.new_zeros(p.shape[:-1])
    if weights.cosine:
        lengths = _length(p) * _length(q)
        loss = loss + weights.cosine * (1 - (p * q).sum(-1) / lengths)
    if weights.smooth_l1:
        loss = loss + weights.smooth_l1 * F.smooth_l1_loss(p, q, reduction="none").mean(-1)
    if weights.mse:
        loss = loss + weights.mse * F.mse_loss(p, q, reduction="none").mean(-1)
    return loss


def _length(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return length.clamp_min(SMALLEST_NORM)


def row_loss(p: Tensor, q: Tensor, weights: LossConfig) -> Tensor:
    """`pair_loss` of [B, C] or [B, T, C], averaged over the tokens: float32 [B]."""
    loss = pair_loss(p, q, weights)
    return loss.mean(1) if loss.dim() == 2 else loss


def weighted_mean(loss_B: Tensor, weight_B: Tensor) -> Tensor:
    """Sum of `loss_B * weight_B` over the sum of the weights, float32 []; 0 if all weights are 0.

    In a distributed run over the mean of the workers' sums: the mean over workers of what each gets, and of its
    gradient, is then that of the whole batch, however its masked rows are spread.
    """
    weight_B = weight_B.to(loss_B.dtype)
    total = over_workers(weight_B.sum()) / worker_count()
    return (loss_B * weight_B).sum() / torch.where(total > 0, total, 1.0)


def resize_map(x_BTC: Tensor, grid: TokenGrid, to: TokenGrid) -> Tensor:
    """Bilinear resize of a map from `grid` to `to`, corners not aligned, antialiased along a side that shrinks.

    Equal to `F.interpolate(mode="bilinear", align_corners=False, antialias=True)`, as two small matrix products in
    float32: several times faster backwards on a CPU, and deterministic on every device.

    Args:
        x_BTC: tokens row by row, T = H * W of `grid`.
        grid: (H, W) of the map.
        to: (H, W) wanted.

    Returns:
        [B, T', C] in the type of `x_BTC`; `x_BTC` itself where the grids are equal.

    Raises:
        MismatchError: the tokens do not fill the grid.
    """
    (high, wide), (new_high, new_wide) = grid, to
    batch, tokens, channels = x_BTC.shape
    if tokens != high * wide:
        raise MismatchError(f"map: expected {high * wide} tokens for the grid {high} x {wide}, found {tokens}")
    if grid == to:
        return x_BTC
    with torch.autocast(x_BTC.device.type, enabled=False):
        x = x_BTC.float()
        if new_high != high:
            x = _weights(high, new_high, x.device) @ x.reshape(batch, high, wide * channels)
        if new_wide != wide:
            x = _weights(wide, new_wide, x.device) @ x.reshape(batch * new_high, wide, channels)
        return x.reshape(batch, new_high * new_wide, channels).to(x_BTC.dtype)


@lru_cache(maxsize=256)
def _weights(length: int, to: int, device: torch.device) -> Tensor:
    """The resize of one side as a matrix, float32 [to, length]."""
    # A cached tensor made under inference mode could never enter a graph.
    with torch.inference_mode(False), torch.no_grad():
        unit = torch.eye(length)[None, None]
        shape = (to, length)
        resized = F.interpolate(unit, size=shape, mode="bilinear", align_corners=False, antialias=to < length)
        return resized[0, 0].to(device)


def weighted_moments(x: Tensor, weight_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of every channel over all vectors of the batch, and of all workers' batches.

    Args:
        x: [B, C] or [B, T, C]; every token of a row has the row's weight.
        weight_B: row weights.

    Returns:
        Mean and variance, float32 [C], both 0 if all weights are 0.
    """
    x_BTC, weight_B = _tokens(x), weight_B.float()
    total = over_workers(weight_B.sum()) * x_BTC.shape[1]
    total = torch.where(total > 0, total, 1.0)
    mean_C = over_workers((x_BTC.sum(1) * weight_B[:, None]).sum(0)) / total
    squares_BC = (x_BTC - mean_C).square().sum(1)
    return mean_C, over_workers((squares_BC * weight_B[:, None]).sum(0)) / total


def variance_term(variance_C: Tensor) -> Tensor:
    """VICReg's variance term, mean over channels of max(0, 1 - sqrt(variance + 1e-4)) (Bardes et al. 2022, eq. 1)."""
    return F.relu(VICREG_STD - (variance_C + VICREG_EPSILON).sqrt()).mean()


def covariance_term(x: Tensor, weight_B: Tensor) -> Tensor:
    """VICReg's covariance term: squared covariances of different channels, summed, over C (Bardes et al. 2022, eq. 4).

    Over all vectors of the batch and of all workers' batches; the covariance is divided by their weight, where the
    paper divides by their number less 1.

    Args:
        x: [B, C] or [B, T, C], about centred: computed in one pass.
        weight_B: row weights.
    """
    x_BTC, weight_B = _tokens(x), weight_B.float()
    channels = x_BTC.shape[-1]
    total = over_workers(weight_B.sum()) * x_BTC.shape[1]
    total = torch.where(total > 0, total, 1.0)
    with torch.autocast(x.device.type, enabled=False):
        weighted_BTC = x_BTC * weight_B[:, None, None]
        products_CC = over_workers(weighted_BTC.reshape(-1, channels).T @ x_BTC.reshape(-1, channels)) / total
        mean_C = over_workers(weighted_BTC.sum((0, 1))) / total
        covariance_CC = products_CC - torch.outer(mean_C, mean_C)
    return (covariance_CC.square().sum() - covariance_CC.diagonal().square().sum()) / channels


def _tokens(x: Tensor) -> Tensor:
    """float32 [B, T, C]; a vector has one token."""
    return x.float() if x.dim() == 3 else x.float()[:, None]


def worker_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def over_workers(x: Tensor) -> Tensor:
    """Sum over the workers of a distributed run, gradients included; x itself in any other."""
    if worker_count() == 1:
        return x
    summed: Tensor = _Sum.apply(x)
    return summed


class _Sum(torch.autograd.Function):
    """All-reduce (sum) in forward and backward."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient
