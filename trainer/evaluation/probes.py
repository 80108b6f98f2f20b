"""What a frozen feature knows: a linear probe and k nearest neighbours.

Letters: n rows, C channels, K classes.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kpu.errors import MismatchError

PENALTIES: Final = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_STEPS: Final = 200  # of L-BFGS, at most, for each penalty
_TOLERANCE: Final = 2e-5  # of the gradient, in coordinates in which the curvature is about 1
_CHUNK: Final = 1 << 22  # numbers in a temporary matrix, at most: 16 MiB


class ProbeResult(NamedTuple):
    """Accuracy on the test rows, from 0 to 1, of the probe with the `penalty` that did best on the validation rows."""

    accuracy: float
    penalty: float


def linear_probe(
    x_train: Tensor,
    y_train: Tensor,
    x_validation: Tensor,
    y_validation: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    penalties: Sequence[float] = PENALTIES,
) -> ProbeResult:
    """Multinomial logistic regression on features standardised by the mean and deviation of `x_train`.

    Minimises mean cross-entropy + penalty / 2 * |W|^2 (the intercept is free): scikit-learn's `LogisticRegression` at
    C = 1 / (penalty * n). Of equals on the validation rows the largest penalty is taken. All tensors on one device.

    Args:
        x_train: float [n, C].
        y_train: int64 [n], any labels.
        x_validation: float [., C].
        y_validation: int64 [.].
        x_test: float [., C].
        y_test: int64 [.].
        penalties: Numbers above 0.

    Raises:
        MismatchError: Features are not finite, or rows and labels are not equally many, or none.
        ValueError: There is no penalty, or one is not above 0.
    """
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"penalties: expected numbers above 0, found {list(penalties)}")
    for part, x, y in (
        ("train", x_train, y_train),
        ("validation", x_validation, y_validation),
        ("test", x_test, y_test),
    ):
        _check(part, x, y)
    space = _Space(x_train)
    classes, codes = torch.unique(y_train, return_inverse=True)
    x, x_validation = space(x_train), space(x_validation)
    weights = x.new_zeros(len(classes), x.shape[1])
    best, chosen, chosen_weights = -1.0, 0.0, weights
    for penalty in sorted(penalties, reverse=True):  # each starts where the one before ended
        weights = _fit(x, codes, weights, penalty, space.variance)
        accuracy = _accuracy(x_validation, y_validation, weights, classes)
        if accuracy > best:
            best, chosen, chosen_weights = accuracy, penalty, weights
    return ProbeResult(_accuracy(space(x_test), y_test, chosen_weights, classes), chosen)


def knn(
    x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Accuracy of a vote of the k training rows with the highest cosine, each worth exp(cosine / temperature).

    The weighted vote of Wu et al. 2018 ("instance discrimination"), on features centred by the mean of `x_train`.
    Memory beside the features does not grow with the number of test rows.

    Args:
        x_train: float [n, C].
        y_train: int64 [n], any labels.
        x_test: float [., C].
        y_test: int64 [.].
        k: Neighbours; all where there are fewer.
        temperature: Above 0; the lower, the more the nearest decide.

    Raises:
        MismatchError: Features are not finite, or rows and labels are not equally many, or none.
    """
    _check("train", x_train, y_train)
    _check("test", x_test, y_test)
    classes, codes = torch.unique(y_train, return_inverse=True)
    centre = x_train.double().mean(0).float()
    train = F.normalize(x_train.float() - centre, dim=1)
    right = torch.zeros((), dtype=torch.int64, device=x_test.device)
    rows = max(1, _CHUNK // max(len(train), len(classes)))
    for x, y in zip(x_test.split(rows), y_test.split(rows), strict=True):
        cosines, nearest = (F.normalize(x.float() - centre, dim=1) @ train.T).topk(min(k, len(train)), dim=1)
        # Less the largest, for low temperatures: a factor common to all votes of a row.
        worth = ((cosines - cosines[:, :1]) / temperature).exp()
        votes = worth.new_zeros(len(x), len(classes)).scatter_add_(1, codes[nearest], worth)
        right += (classes[votes.argmax(1)] == y).sum()
    return int(right) / len(y_test)


class _Space:
    """Standardised features on the axes of their correlation, with a column of ones at the end.

    A rotation changes neither the logits that are possible nor the penalty; on these axes the curvature of the loss is
    nearly diagonal, which spares L-BFGS most of its steps.
    """

    def __init__(self, x_train: Tensor) -> None:
        x = x_train.double()
        self._mean = x.mean(0)
        std = x.std(0, correction=0)
        # Rounding may leave a constant channel a deviation next to nothing.
        dead = std <= 1e-7 * self._mean.abs()
        self._scale = torch.where(dead, 0.0, 1 / std.masked_fill(dead, 1.0))
        x = (x - self._mean) * self._scale
        self.variance, self._axes = torch.linalg.eigh(x.T @ x / len(x))

    def __call__(self, x: Tensor) -> Tensor:
        x = (((x.double() - self._mean) * self._scale) @ self._axes).float()
        return F.pad(x, (0, 1), value=1.0)


def _fit(x: Tensor, codes: Tensor, start: Tensor, penalty: float, variance: Tensor) -> Tensor:
    """The weights [K, C + 1] that minimise the objective of `linear_probe`, the intercept in the last column.

    Args:
        x: float32 [n, C + 1], the last column ones.
        codes: int64 [n], from 0 to K - 1.
        start: float32 [K, C + 1], where to begin.
        penalty: Above 0.
        variance: float64 [C], of the columns of x.
    """
    penalties = torch.cat([torch.full_like(variance, penalty), variance.new_zeros(1)]).float()
    curvature = torch.cat([variance.clamp(min=0), variance.new_ones(1)]).float() / len(start) + penalties
    scale = curvature.rsqrt()
    free = (start / scale).requires_grad_()
    search = torch.optim.LBFGS(
        [free],
        max_iter=_STEPS,
        history_size=10,
        tolerance_grad=_TOLERANCE,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        weights = free * scale
        loss, gradient = _cross_entropy(x, codes, weights)
        free.grad = (gradient + penalties * weights) * scale
        return loss + 0.5 * (penalties * weights.square()).sum()

    search.step(closure)
    return (free * scale).detach()


def _cross_entropy(x: Tensor, codes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of softmax(x @ weights') and its gradient [K, C + 1]; float64 and float32."""
    loss, gradient = torch.zeros((), dtype=torch.float64, device=x.device), torch.zeros_like(weights)
    rows = max(1, _CHUNK // len(weights))
    for part, code in zip(x.split(rows), codes.split(rows), strict=True):
        logs = F.log_softmax(part @ weights.T, dim=1)
        loss -= logs.gather(1, code[:, None]).sum(dtype=torch.float64)
        residual = logs.exp_().scatter_add_(1, code[:, None], logs.new_full((len(code), 1), -1.0))
        gradient.addmm_(residual.T, part)
    return loss / len(x), gradient / len(x)


def _accuracy(x: Tensor, y: Tensor, weights: Tensor, classes: Tensor) -> float:
    predicted = [classes[(part @ weights.T).argmax(1)] for part in x.split(max(1, _CHUNK // len(classes)))]
    return float((torch.cat(predicted) == y).double().mean())


def _check(part: str, x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(y):
        raise MismatchError(
            f"{part} rows of the probe: expected features [n, C] and labels [n], n above 0, "
            f"found shapes {list(x.shape)} and {list(y.shape)}; give each row its label"
        )
    if not torch.isfinite(x).all():
        raise MismatchError(
            f"{part} rows of the probe: expected finite features, found NaN or infinity; "
            "leave masked rows out, and if none is masked lower optim.lr"
        )
