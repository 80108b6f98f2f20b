"""The shared space as one frozen projection of all teachers, which cannot collapse.

Letters: B rows of a batch, N vectors, K channels of all teachers side by side, D channels of the base.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from kpu.errors import ConfigError
from kpu.format.statistics import Accumulator
from trainer.objective.projectors import PcaProjector, Shapes, onto_grid, slot
from trainer.objective.unify import Outputs, Restorations, SharedSpace, Targets, Weights
from trainer.sections import UnifyConfig


class PcaSpace(SharedSpace):
    """Mode `pca`: for each output one u for all specialists, a frozen projection of all targets side by side.

    The targets of all teachers, the base among them, are resized to the base's grid, joined along channels, and
    projected by `PcaProjector`, turned onto the base's own channels. `fit` comes first.
    """

    def __init__(self, config: UnifyConfig, base: str, shapes: Mapping[str, Shapes]) -> None:
        super().__init__(config, base, shapes)
        self.projectors = nn.ModuleDict()
        for output, shape in self.shapes[base].items():
            channels = sum(own[output].channels for own in self.shapes.values() if output in own)
            self.projectors[slot(base, output)] = PcaProjector(channels, shape.channels)

    def fit(self, batches: Iterable[tuple[Targets, Weights]]) -> None:
        """Fit on targets and row weights of batches until `pca_rows` rows that every teacher has; then freeze.

        Raises:
            ConfigError: fewer vectors than channels.
        """
        moments = {o: Accumulator(len(self._projector(o).mean)) for o in self.shapes[self.base]}
        rows = 0
        for targets, weights in batches:
            whole_B = torch.stack([weights[teacher] for teacher in self.shapes]).amin(0) > 0
            for output, accumulator in moments.items():
                x_NK = torch.cat(self._joined(output, targets, None), -1)[whole_B].flatten(0, -2).double()
                mean_K = x_NK.mean(0)
                away_NK = x_NK - mean_K
                accumulator.add(len(x_NK), mean_K.cpu().numpy(), (away_NK.T @ away_NK).cpu().numpy())
            rows += int(whole_B.sum())
            if rows >= self.config.pca_rows:
                break
        for output, accumulator in moments.items():
            projector = self._projector(output)
            if accumulator.count < len(projector.mean):
                raise ConfigError(
                    f"unify.pca_rows: expected at least {len(projector.mean)} vectors of {output!r}, one for each "
                    f"channel of all teachers, found {accumulator.count} in {rows} rows; raise it, "
                    "or use another unify.mode"
                )
            statistics = accumulator.finish(1.0)
            projector.fit(statistics.mean, statistics.covariance, self._places(output)[self.base])
        self.freeze()

    def forward(self, targets: Targets, weights: Weights | None = None) -> Outputs:
        """As `SharedSpace.forward` says; targets of every teacher are needed. What `weights` mask counts as the mean.

        Raises:
            RuntimeError: `fit` was not called.
        """
        if not self.frozen:
            raise RuntimeError("PcaSpace: expected fit() before forward()")
        shared = {
            output: self._projector(output)(torch.cat(self._joined(output, targets, weights), -1))
            for output in self.shapes[self.base]
        }
        placed = {teacher: {o: shared[o] for o in self.shapes[teacher]} for teacher in self.specialists}
        return placed | {self.base: {o: targets[self.base][o].float() for o in shared}}

    def restorations(self, targets: Targets) -> Restorations:
        """As `SharedSpace.restorations` says; here each output's decoder is the projection's transpose."""
        found: Restorations = {teacher: {} for teacher in self.specialists}
        for output in self.shapes[self.base]:
            joined = torch.cat(self._joined(output, targets, None), -1)
            projector = self._projector(output)
            restored = projector.restore(projector(joined))
            for teacher, place in self._places(output).items():
                if teacher != self.base:
                    found[teacher][output] = restored[..., place], joined[..., place]
        return found

    def _projector(self, output: str) -> PcaProjector:
        found = self.projectors[slot(self.base, output)]
        assert isinstance(found, PcaProjector)
        return found

    def _places(self, output: str) -> dict[str, slice]:
        """Where each teacher's channels lie among all."""
        places, start = {}, 0
        for teacher, own in self.shapes.items():
            if output in own:
                places[teacher] = slice(start, start + own[output].channels)
                start += own[output].channels
        return places

    def _joined(self, output: str, targets: Targets, weights: Weights | None) -> list[Tensor]:
        """Targets of every teacher on the base's grid, float32, rows of weight 0 set to 0."""
        parts = []
        for teacher in self._places(output):
            own, base = self.shapes[teacher][output], self.shapes[self.base][output]
            part = onto_grid(targets[teacher][output].float(), own, base)
            if weights is not None:
                part = part * (weights[teacher] > 0).view(-1, *[1] * (part.dim() - 1))
            parts.append(part)
        return parts
