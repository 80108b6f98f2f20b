"""How close a student's predictions are to what teachers said, over any rows.

Letters: C channels.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from trainer.data.loading import Batch, BatchLoader, DeviceTransfer, Drawn
from trainer.data.resident import RowNumbers
from trainer.model import Inheritance
from trainer.util.metrics import R2


class Scores:
    """R2 in the standardised space, by teacher and output, and of the student itself against the base."""

    def __init__(self, model: Inheritance) -> None:
        self._model = model
        self._outputs = model.config.outputs
        self._teachers = {(name, output): R2() for name in model.teachers for output in self._outputs}
        self._base = {output: R2() for output in self._outputs}

    def update(self, batch: Batch, features: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Add a batch with the student's features of it; the predicted standardised features by teacher and output."""
        model = self._model
        predicted = {name: model.predict(features, name) for name in model.teachers}
        for name, weight in model.weights(batch).items():
            valid = weight > 0
            for output in self._outputs:
                self._teachers[name, output].update(predicted[name][output], batch.targets[name][output], valid)
        for output in self._outputs:
            base = batch.targets[model.base][output]
            own = features[output][..., : base.shape[-1]]
            self._base[output].update(own.float(), base, batch.weights[model.base] > 0)
        return predicted

    def as_json(self) -> dict[str, Any]:
        """`{"teachers": {name: {"r2_<output>": value}}, "base": {"r2": ..., "r2_<output>": value}}`."""
        teachers = {
            name: {f"r2_{output}": _value(self._teachers[name, output]) for output in self._outputs}
            for name in self._model.teachers
        }
        base = {f"r2_{output}": _value(self._base[output]) for output in self._outputs}
        return {"teachers": teachers, "base": {"r2": float(np.mean(list(base.values()))), **base}}


def batches_of(
    rows: RowNumbers, size: int, loader: BatchLoader, upload: DeviceTransfer, *, images: bool = True
) -> Iterator[Batch]:
    """The given rows in order, `size` at a time; the last batch may be shorter. `images` as for `BatchLoader.load`."""

    def drawn() -> Iterable[Drawn]:
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            yield Drawn(chosen, np.zeros_like(chosen), 0)

    for _, host in loader.load(iter(drawn()), images=images):
        yield upload(host)


@torch.no_grad()
def score(model: Inheritance, batches: Iterable[Batch]) -> dict[str, Any]:
    """`Scores` of a model in evaluation mode over batches; the model's mode is as before afterwards."""
    training = model.training
    model.eval()
    scores = Scores(model)
    for batch in batches:
        scores.update(batch, model.encode(batch))
    model.train(training)
    return scores.as_json()


def _value(r2: R2) -> float:
    try:
        return r2.value()
    except ValueError:  # no valid row
        return float("nan")
