"""What a student has to beat: linear maps from the frozen base to each teacher, and each teacher by itself.

Letters: B rows, T tokens of a map, n vectors, D channels of the base, C of a teacher.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from trainer.data.loading import Batch
from trainer.data.resident import RowNumbers
from trainer.data.shapes import OutputShape
from trainer.data.split import some_of
from trainer.objective.projectors import onto_grid

PENALTY: Final = 1e-4
"""Of the ridge, relative to the variance of a channel of the base, which is about 1."""
VECTORS: Final = 2**19
"""A map is fitted on as many vectors, at most."""

Shapes = Mapping[str, Mapping[str, OutputShape]]


class LinearMaps:
    """The best linear map, with an intercept, from each output of the base to that of each teacher, standardised.

    Ridge regression in closed form: W = (X'X + penalty n I)^-1 X'Y in float64, the intercept not penalised. Maps are
    fitted token by token, with the base's map on the teacher's grid, on a seeded choice of `rows` [n]: neighbours in a
    cache may all be of one class.
    """

    def __init__(self, base: str, shapes: Shapes, rows: RowNumbers, seed: int) -> None:
        self._base, self._shapes = base, shapes
        tokens = {shape.tokens for outputs in shapes.values() for shape in outputs.values()}
        self._rows = {count: some_of(rows, VECTORS // count, seed) for count in tokens}
        self._moments: dict[tuple[str, str], _Moments] = {}
        self._weights: dict[tuple[str, str], Tensor] = {}

    def update(self, batch: Batch) -> None:
        """Add those rows of a batch that were chosen and are valid in both."""
        device = batch.weights[self._base].device
        chosen = {n: torch.from_numpy(np.isin(batch.rows, rows)).to(device) for n, rows in self._rows.items()}
        for teacher, outputs in self._shapes.items():
            valid_B = (batch.weights[teacher] > 0) & (batch.weights[self._base] > 0)
            for output, shape in outputs.items():
                moments = self._moments.setdefault((teacher, output), _Moments())
                kept_B = valid_B & chosen[shape.tokens]
                base = {output: batch.targets[self._base][output][kept_B]}
                moments.update(self._aligned(base, teacher, output), batch.targets[teacher][output][kept_B])

    def solve(self) -> "LinearMaps":
        """Fix the maps by what was added; a teacher without any valid row has none."""
        self._weights = {key: moments.solve() for key, moments in self._moments.items() if moments.count}
        return self

    def __contains__(self, teacher: str) -> bool:
        return all((teacher, output) in self._weights for output in self._shapes[teacher])

    def predict(self, base: Mapping[str, Tensor], teacher: str) -> dict[str, Tensor]:
        """Standardised outputs of a teacher, float32, from the base's."""
        found = {}
        for output in self._shapes[teacher]:
            weight = self._weights[teacher, output]
            x = self._aligned(base, teacher, output)
            found[output] = x @ weight[:-1] + weight[-1]
        return found

    def _aligned(self, base: Mapping[str, Tensor], teacher: str, output: str) -> Tensor:
        """The base's output on the teacher's grid: a linear map per token and a resize may change places."""
        own, wanted = self._shapes[self._base][output], self._shapes[teacher][output]
        return onto_grid(base[output].float(), own, wanted)


class _Moments:
    """X'X and X'Y of n vectors, a column of ones at the end of X, float64."""

    def __init__(self) -> None:
        self.count = 0
        self._square: Tensor | None = None
        self._cross: Tensor | None = None

    def update(self, x: Tensor, y: Tensor) -> None:
        x, y = x.flatten(0, -2).double(), y.flatten(0, -2).double()
        x = torch.nn.functional.pad(x, (0, 1), value=1.0)
        square, cross = x.T @ x, x.T @ y
        self._square = square if self._square is None else self._square + square
        self._cross = cross if self._cross is None else self._cross + cross
        self.count += len(x)

    def solve(self) -> Tensor:
        """float32 [D + 1, C], the intercept last."""
        assert self._square is not None and self._cross is not None
        penalty = torch.full((len(self._square),), PENALTY * self.count, dtype=torch.float64)
        penalty[-1] = 0
        weight: Tensor = torch.linalg.solve(self._square + penalty.to(self._square.device).diag(), self._cross)
        return weight.float()
