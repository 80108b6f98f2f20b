"""Whether the shared space is worth learning from: figures per teacher and output, and the limits on them.

Letters: B rows, D channels of the base.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kpu.errors import MismatchError
from kpu.format.statistics import Accumulator
from trainer.objective.losses import row_loss
from trainer.objective.unify import SharedSpace, Targets, Weights
from trainer.sections import LossConfig, UnifyConfig
from trainer.util.metrics import R2, covariance_rank

_VECTORS_A_RANK: Final = 4
"""A teacher of which fewer vectors were seen than so many times the limit on the rank is not held against it."""


@dataclass(frozen=True)
class GateFigures:
    """What is known of u_t of one output of one teacher, over all vectors of the rows that both it and the base have.

    distance: l(z'_base, u_t), mean over rows.
    chance: the same with the base's rows exchanged for others of the batch: what a u_t that knows nothing of the row
        would have. NaN if no batch had two rows.
    floor: l(mean_t u_t, u_t), the mean over the teachers that have the row: no student can be nearer to all of them.
    effective_rank: of the covariance of u_t, from 1 to `channels`.
    lowest_std: the smallest standard deviation of a channel of u_t.
    reconstruction: R2 of the target read back from u_t; None for a space without decoders.
    vectors: how many u_t were seen.
    """

    distance: float
    chance: float
    floor: float
    effective_rank: float
    channels: int
    lowest_std: float
    reconstruction: float | None
    vectors: int


@dataclass(frozen=True)
class GateReport:
    """Figures by specialist and output."""

    figures: dict[str, dict[str, GateFigures]]

    def flat(self) -> dict[str, float]:
        """Every figure under `<teacher>/<output>/<figure>`; those that do not exist are left out."""
        return {
            f"{teacher}/{output}/{name}": float(value)
            for teacher, outputs in self.figures.items()
            for output, figures in outputs.items()
            for name, value in vars(figures).items()
            if value is not None
        }


def measure_gates(
    space: SharedSpace, batches: Iterable[tuple[Targets, Weights]], loss: LossConfig | None = None
) -> GateReport:
    """Figures of the space as it is now, by its running statistics, over batches of targets and row weights.

    Rows of weight 0 are left out; other weights count alike. Targets of the base are needed.

    Raises:
        MismatchError: a teacher has no row in common with the base.
    """
    loss = loss or LossConfig()
    meters = {
        (teacher, output): _Meter(space.shapes[space.base][output].channels)
        for teacher in space.specialists
        for output in space.shapes[teacher]
    }
    with _still(space):
        for targets, weights in batches:
            _measure(space, targets, weights, loss, meters)
    figures: dict[str, dict[str, GateFigures]] = {}
    for (teacher, output), meter in meters.items():
        if not meter.vectors.count:
            raise MismatchError(
                f"unify: teacher {teacher!r}, {output}: expected rows that it shares with the base {space.base!r}, "
                "found none; look at the masked rows in `kpu-cache status`"
            )
        figures.setdefault(teacher, {})[output] = meter.figures()
    return GateReport(figures)


class _Meter:
    """Sums for one output of one teacher."""

    def __init__(self, channels: int) -> None:
        self.vectors = Accumulator(channels)
        self.reconstruction = R2()
        self.reads_back = False
        self._sums: dict[str, list[float]] = {"distance": [], "chance": [], "floor": []}
        self._rows: dict[str, int] = dict.fromkeys(self._sums, 0)

    def add(self, name: str, loss_B: Tensor) -> None:
        """Add losses of rows to `distance`, `chance` or `floor`."""
        self._sums[name].append(float(loss_B.double().sum()))
        self._rows[name] += len(loss_B)

    def figures(self) -> GateFigures:
        statistics = self.vectors.finish(1.0)
        means = {name: math.fsum(sums) / (self._rows[name] or math.nan) for name, sums in self._sums.items()}
        return GateFigures(
            **means,
            effective_rank=covariance_rank(statistics.covariance),
            channels=len(statistics.mean),
            lowest_std=float(np.sqrt(statistics.variance.min())),
            reconstruction=self.reconstruction.value() if self.reads_back else None,
            vectors=self.vectors.count,
        )


def _measure(
    space: SharedSpace, targets: Targets, weights: Weights, loss: LossConfig, meters: dict[tuple[str, str], _Meter]
) -> None:
    """Add one batch to the meters."""
    placed, restored = space(targets, weights), space.restorations(targets)
    base_B = weights[space.base] > 0
    for (teacher, output), meter in meters.items():
        valid_B = base_B & (weights[teacher] > 0)
        z, u = placed[space.base][output][valid_B], placed[teacher][output][valid_B]
        if not len(u):
            continue
        meter.add("distance", row_loss(u, z, loss))
        if len(u) > 1:
            meter.add("chance", row_loss(u, z.roll(1, 0), loss))
        having = {name: weights[name] for name in placed if output in placed[name]}
        shares = {name: (weight_B > 0)[valid_B].float() for name, weight_B in having.items()}
        middle = sum(_rows(share_B, u) * placed[name][output][valid_B] for name, share_B in shares.items())
        count_B = torch.stack(list(shares.values())).sum(0)
        meter.add("floor", row_loss(u, middle / _rows(count_B, u), loss))
        meter.vectors.update(u.flatten(0, -2).cpu().numpy())
        if teacher in restored:
            meter.reads_back = True
            meter.reconstruction.update(*restored[teacher][output], weights[teacher] > 0)


def _rows(x_B: Tensor, like: Tensor) -> Tensor:
    return x_B.view(-1, *[1] * (like.dim() - 1))


@contextmanager
def _still(space: SharedSpace) -> Iterator[None]:
    """Evaluation mode and no gradients, undone at the end."""
    training = space.training
    space.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        space.train(training)


def check_gates(report: GateReport, config: UnifyConfig) -> None:
    """Refuse a space that has collapsed or that has lost the base.

    Limits: effective rank at least 1 + `lowest_rank` (D - 1), the share of the directions beyond the first, of a
    teacher of which four times as many vectors were seen;
    `lowest_std`; `lowest_reconstruction`, where there are decoders; and a distance to the base below chance, which the
    placebo `untrained` need not keep. A figure that is not a number fails.

    Raises:
        MismatchError: naming every teacher, output, figure and limit that failed, and what to do.
    """
    failures = [
        f"teacher {teacher!r}, {output}: {failure}"
        for teacher, outputs in report.figures.items()
        for output, figures in outputs.items()
        for failure in _failures(figures, config)
    ]
    if failures:
        raise MismatchError(
            "unify: the shared space cannot be learned from; "
            + "; ".join(failures)
            + ". Raise unify.reconstruction, unify.variance or unify.covariance, take more unify.steps, "
            "or use unify.mode pca"
        )


def _failures(figures: GateFigures, config: UnifyConfig) -> list[str]:
    found = []
    rank = 1 + config.lowest_rank * (figures.channels - 1)
    few = figures.vectors < _VECTORS_A_RANK * rank  # whose rank is low by itself
    if math.isnan(figures.effective_rank) or (figures.effective_rank < rank and not few):
        found.append(
            f"expected an effective rank of at least {rank:.2f} of {figures.channels} channels "
            f"(unify.lowest_rank {config.lowest_rank}), found {figures.effective_rank:.2f}"
        )
    if not figures.lowest_std >= config.lowest_std:
        found.append(
            f"expected a standard deviation of at least {config.lowest_std} in every channel (unify.lowest_std), "
            f"found {figures.lowest_std:.3g}"
        )
    limit = config.lowest_reconstruction
    if figures.reconstruction is not None and not figures.reconstruction >= limit:
        found.append(
            f"expected a reconstruction R2 of at least {limit} (unify.lowest_reconstruction), "
            f"found {figures.reconstruction:.3f}"
        )
    if not math.isfinite(figures.distance):
        found.append(f"expected a finite distance to the base, found {figures.distance}")
    elif config.mode != "untrained" and figures.distance >= figures.chance:
        found.append(
            f"expected a distance to the base below {figures.chance:.3f}, that of rows exchanged at random, "
            f"found {figures.distance:.3f}"
        )
    return found
