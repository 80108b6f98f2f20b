"""Measures of what a student inherited. All sums and eigenvalues are taken in float64.

Letters: C channels.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Labels = npt.NDArray[np.integer]

_LEAST_VARIANCE: Final = 0.01
"""In units of the calibration's: what varies less is a constant channel, of which a codec keeps but rounding."""


def agreement(a: Labels, b: Labels) -> float:
    """Share of places where two labellings agree.

    Args:
        a: Whole numbers [n].
        b: Whole numbers [n].

    Raises:
        ValueError: The shapes differ, or there is nothing to compare.
    """
    _check_labels(a, b)
    return float(np.mean(a == b))


def cohens_kappa(a: Labels, b: Labels) -> float:
    """Agreement beyond chance, (p - e) / (1 - e) with e the agreement of independent draws (Cohen 1960).

    Args:
        a: Whole numbers [n].
        b: Whole numbers [n].

    Returns:
        At most 1; 0 at chance. NaN, as undefined, where both know one and the same label only.

    Raises:
        ValueError: The shapes differ, or there is nothing to compare.
    """
    _check_labels(a, b)
    count = len(a)
    labels, codes = np.unique(np.concatenate([a, b]), return_inverse=True)
    count_a = np.bincount(codes[:count], minlength=len(labels)).astype(np.float64)
    count_b = np.bincount(codes[count:], minlength=len(labels)).astype(np.float64)
    by_chance = float(count_a @ count_b) / count**2
    return (agreement(a, b) - by_chance) / (1 - by_chance) if len(labels) > 1 else float("nan")


def _check_labels(a: Labels, b: Labels) -> None:
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"labels: expected two vectors of one length above 0, found shapes {a.shape} and {b.shape}")


class R2:
    """Coefficient of determination per channel, 1 - residual / total sum of squares, over any number of batches.

    Of standardised features. A channel whose targets have a deviation below 0.1 is as good as constant, and has none.
    The total is taken about the mean of all targets seen; batches are merged by the method of Chan, Golub and LeVeque
    (1979). Nothing leaves the device before a result is asked for.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._count = 0
        self._shift: Tensor | None = None

    def update(self, predicted: Tensor, target: Tensor, valid: Tensor | None = None) -> None:
        """Add a batch of vectors [B, C] or maps [B, T, C], every token of which counts alike.

        Args:
            predicted: float [B, ..., C].
            target: The same shape.
            valid: bool [B], the rows that count; None for all.

        Raises:
            ValueError: The shapes differ.
        """
        if predicted.shape != target.shape:
            raise ValueError(f"predicted: expected the target's shape {target.shape}, found {predicted.shape}")
        if valid is not None:
            predicted, target = predicted[valid], target[valid]
        y = target.detach().flatten(0, -2).double()
        if not len(y):
            return
        residual = (y - predicted.detach().flatten(0, -2).double()).square().sum(0)
        if self._shift is None:
            self._shift = y[0]  # sums beside a large mean would lose digits
            self._residual, self._total, self._mean = (torch.zeros_like(y[0]) for _ in range(3))
        y = y - self._shift
        mean, count = y.mean(0), self._count + len(y)
        away = mean - self._mean
        self._residual += residual
        self._total += (y - mean).square().sum(0) + away.square() * (self._count * len(y) / count)
        self._mean += away * (len(y) / count)
        self._count = count

    def channels(self) -> npt.NDArray[np.float64]:
        """R2 of each channel, float64 [C]; NaN if the targets hardly vary.

        Raises:
            ValueError: Nothing was seen.
        """
        r2 = torch.where(self._alive(), 1 - self._residual / self._total, torch.nan)
        values: npt.NDArray[np.float64] = r2.cpu().numpy()
        return values

    def value(self) -> float:
        """Mean over the channels that vary; NaN if none does.

        Raises:
            ValueError: Nothing was seen.
        """
        alive = self._alive()
        r2 = 1 - self._residual[alive] / self._total[alive]
        return float(r2.mean())  # of nothing: NaN

    def _alive(self) -> Tensor:
        """The channels whose targets vary or are NaN, bool [C]."""
        if self._shift is None:
            raise ValueError("R2: expected at least one valid row, found none")
        return ~(self._total < _LEAST_VARIANCE * self._count)


def covariance_rank(covariance: npt.NDArray[np.float64]) -> float:
    """Effective rank: exp of the entropy of the eigenvalues over their sum (after Roy and Vetterli 2007).

    Args:
        covariance: float64 [C, C], symmetric.

    Returns:
        From 1 to C; 0 if nothing varies.
    """
    eigenvalues = np.linalg.eigvalsh(covariance).clip(min=0)
    total = eigenvalues.sum()
    if total == 0:
        return 0.0
    shares = eigenvalues[eigenvalues > 0] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))
