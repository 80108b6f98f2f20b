"""What evaluation counts over any number of batches: closeness to each teacher and to the base.

Letters: B rows of a batch, C channels, K outputs of a classifier, n rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.corpus import TeacherInfo
from trainer.data.resident import RowNumbers
from trainer.util.metrics import R2, agreement, cohens_kappa

Features = Mapping[str, Tensor]
NO_LABEL: Final = -1


class OwnHead:
    """A teacher's own linear classifier on its standardised `global`."""

    def __init__(self, source: TeacherInfo, device: torch.device) -> None:
        assert source.head is not None
        statistics = source.statistics["global"]
        weight, bias = (np.asarray(part, np.float64) for part in source.head)
        # Un-standardised first, then classified: one map, folded in float64.
        self._weight = torch.from_numpy((weight * statistics.std).astype(np.float32)).to(device)
        self._bias = torch.from_numpy((bias + weight @ statistics.centre).astype(np.float32)).to(device)

    def __call__(self, x_BC: Tensor) -> RowNumbers:
        """The output with the largest logit, int64 [B]."""
        found: RowNumbers = (x_BC.float() @ self._weight.T + self._bias).argmax(dim=1).cpu().numpy()
        return found


class HeadMeasures:
    """A teacher's head on inherited features against the same head on the teacher's own, and against labels."""

    def __init__(self, head: OwnHead | None, labels: Sequence[int] | None) -> None:
        self._head = head
        self._labels = None if labels is None else np.asarray(labels, np.int64)
        self._inherited: list[RowNumbers] = []
        self._own: list[RowNumbers] = []
        self._truth: list[RowNumbers] = []

    def update(self, inherited_BC: Tensor, own_BC: Tensor, truth_B: RowNumbers) -> None:
        """Add standardised `global` features, all of them valid; labels are NO_LABEL where there is none."""
        if self._head is None or not len(truth_B):
            return
        self._inherited.append(self._head(inherited_BC))
        self._own.append(self._head(own_BC))
        self._truth.append(truth_B)

    def as_json(self) -> dict[str, float | None]:
        """Agreement, kappa, accuracy, and the share of the teacher's most frequent answer; None without a head."""
        if not self._own:
            return dict.fromkeys(("agreement", "kappa", "majority", "accuracy"))
        inherited, own = np.concatenate(self._inherited), np.concatenate(self._own)
        return {
            "agreement": agreement(inherited, own),
            "kappa": finite_or_none(cohens_kappa(inherited, own)),
            "majority": float(np.bincount(own).max() / len(own)),
            "accuracy": self._accuracy(inherited),
        }

    def own_accuracy(self) -> float | None:
        """Accuracy of the teacher itself."""
        return self._accuracy(np.concatenate(self._own)) if self._own else None

    def _accuracy(self, answers: RowNumbers) -> float | None:
        return None if self._labels is None else mapped_accuracy(answers, np.concatenate(self._truth), self._labels)


def mapped_accuracy(answers: RowNumbers, truth: RowNumbers, labels: npt.NDArray[np.int64]) -> float | None:
    """Share of answers whose label is the true one; None if no row can be judged.

    Args:
        answers: int64 [n], outputs of a classifier.
        truth: int64 [n], labels, NO_LABEL for none.
        labels: int64 [K], the label that each output means, NO_LABEL for none. Where exactly one has none it
            means "anything else", and rows with a label that no output means count; else those are left out.
    """
    known = np.isin(truth, labels[labels != NO_LABEL])
    others = np.count_nonzero(labels == NO_LABEL) == 1
    judged = (truth != NO_LABEL) & (known | others)
    if not judged.any() or (labels == NO_LABEL).all():
        return None
    expected = np.where(known, truth, NO_LABEL)
    return float(np.mean(labels[answers[judged]] == expected[judged]))


class TeacherMeasures:
    """R2 of each output and what the head says, for one teacher."""

    def __init__(self, outputs: Sequence[str], head: OwnHead | None, labels: Sequence[int] | None) -> None:
        self._r2 = {output: R2() for output in outputs}
        self.head = HeadMeasures(head, labels)

    def update(self, predicted: Features, own: Features, valid_B: Tensor, truth_B: RowNumbers) -> None:
        """Add standardised features."""
        for output, r2 in self._r2.items():
            r2.update(predicted[output].float(), own[output], valid_B)
        if "global" in self._r2:
            truth_B = truth_B[valid_B.cpu().numpy()]
            self.head.update(predicted["global"][valid_B], own["global"][valid_B], truth_B)

    def r2(self) -> dict[str, float | None]:
        """By `r2_<output>`."""
        return {f"r2_{output}": value_of(r2) for output, r2 in self._r2.items()}

    def as_json(self) -> dict[str, float | None]:
        """Everything."""
        return {**self.head.as_json(), **self.r2()}


def value_of(r2: R2) -> float | None:
    """R2, None if it is undefined."""
    try:
        return finite_or_none(r2.value())
    except ValueError:  # no valid row
        return None


def finite_or_none(value: float) -> float | None:
    """None for NaN, which JSON lacks."""
    return None if np.isnan(value) else float(value)


def mean_of(values: Mapping[str, Any]) -> float | None:
    """Mean of the numbers that are there."""
    found = [value for value in values.values() if value is not None]
    return float(np.mean(found)) if found else None
