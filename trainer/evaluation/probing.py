"""Vectors that are kept while batches pass, and what probes find in them.

Letters: B rows of a batch, C channels, n rows that are kept.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from kpu.format.statistics import Accumulator
from trainer.data.loading import Batch
from trainer.evaluation.measures import NO_LABEL, Features
from trainer.evaluation.probes import knn, linear_probe
from trainer.util.metrics import covariance_rank

STUDENT: Final = "/student"  # a name that no teacher can have


class Vectors:
    """One vector a row by name, in standardised units, with labels: what is probed. And ranks over all rows.

    They wait in host memory, and are given back on `device`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ranks: dict[str, Accumulator] = {}
        self._kept: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def update(self, name: str, x_BC: Tensor, valid_B: Tensor, labels_B: Tensor, kept_B: Tensor) -> None:
        """Add rows; those `kept_B` (bool) that are valid and have a label stay in memory."""
        valid = x_BC[valid_B].float().cpu()
        self._ranks.setdefault(name, Accumulator(x_BC.shape[1])).update(valid.numpy())
        chosen = (valid_B.cpu() & kept_B) & (labels_B != NO_LABEL)
        self._kept.setdefault(name, []).append((x_BC.float().cpu()[chosen], labels_B[chosen]))

    def rank(self, name: str) -> float | None:
        """Effective rank over all valid rows."""
        found = self._ranks.get(name)
        return covariance_rank(found.finish(1.0).covariance) if found is not None and found.count else None

    def labelled(self, name: str) -> tuple[Tensor, Tensor]:
        """Kept vectors [n, C] and labels int64 [n]."""
        parts = self._kept.get(name, [(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))])
        x, y = (torch.cat(each).to(self._device) for each in zip(*parts, strict=True))
        return x, y

    def __len__(self) -> int:
        """How many of the student's have a label."""
        return sum(len(y) for _, y in self._kept.get(STUDENT, []))


def summary_of(features: Features) -> Tensor:
    """`global` [B, C]; the mean of the map where there is none."""
    return features["global"] if "global" in features else features["patch"].mean(dim=1)


def add_vectors(into: Vectors, base: str, batch: Batch, features: Features, truth_B: Tensor, kept_B: Tensor) -> None:
    """Add a batch: the student's vectors, and each teacher's own."""
    into.update(STUDENT, summary_of(features), batch.weights[base] > 0, truth_B, kept_B)
    for name, targets in batch.targets.items():
        into.update(name, summary_of(targets), batch.weights[name] > 0, truth_B, kept_B)


def probe_all(
    names: Sequence[str],
    why_not: str | None,
    fitted: Vectors,
    chosen: Vectors,
    tested: Vectors,
    notes: list[str],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Linear probe, k-NN and effective rank of the student, and of the teachers called `names`.

    Fitted on `fitted`, with the penalty that does best on `chosen`, measured on `tested`; `why_not` says why labels of
    these cannot be compared.
    """
    why = why_not or _lacking(fitted, chosen, tested)
    if why is not None:
        notes.append(f"no linear_probe and no knn: {why}")
    results = {
        name: {**_probe(name, fitted, chosen, tested, why), "effective_rank": tested.rank(name)}
        for name in (STUDENT, *names)
    }
    return results[STUDENT], {name: results[name] for name in names}


def _lacking(fitted: Vectors, chosen: Vectors, tested: Vectors) -> str | None:
    for vectors, where in ((tested, "measured"), (fitted, "training"), (chosen, "training")):
        if len(vectors) == 0:
            return f"no {where} row has a label"
    return None


def _probe(name: str, fitted: Vectors, chosen: Vectors, tested: Vectors, why: str | None) -> dict[str, float | None]:
    parts = [vectors.labelled(name) for vectors in (fitted, chosen, tested)]
    if why is not None or any(len(y) == 0 for _, y in parts):
        return {"linear_probe": None, "knn": None}
    (x, y), (x_chosen, y_chosen), (x_test, y_test) = parts
    return {
        "linear_probe": linear_probe(x, y, x_chosen, y_chosen, x_test, y_test).accuracy,
        "knn": knn(x, y, x_test, y_test),
    }
