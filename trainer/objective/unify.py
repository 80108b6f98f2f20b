"""The shared latent space: every teacher's targets brought to the base's channels and grid, as u.

Everything here is in units of standardised outputs, and the base is its own u. A row of weight 0 counts in no
statistic and no term.

Letters: B rows, T tokens of a map, P of the base's, C channels of a teacher, D of the base, K of all teachers.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.objective.losses import covariance_term, row_loss, variance_term, weighted_mean
from trainer.objective.normalize import UnitVariance
from trainer.objective.projectors import Projector, Shapes, check_outputs, onto_grid, slot
from trainer.sections import LossConfig, UnifyConfig

Targets = Mapping[str, Mapping[str, Tensor]]
Weights = Mapping[str, Tensor]
Outputs = dict[str, dict[str, Tensor]]
Restorations = dict[str, dict[str, tuple[Tensor, Tensor]]]
Terms = dict[str, Tensor]


class SharedSpace(nn.Module):
    """What both kinds of the space have in common; see `LearnedSpace` and `PcaSpace`.

    `frozen` says that the maps are final: the statistics of the normalisation stay as they are and no parameter takes a
    gradient, in training mode too. It belongs to the state, so that a resumed run stays frozen.
    """

    is_frozen: Tensor

    def __init__(self, config: UnifyConfig, base: str, shapes: Mapping[str, Shapes]) -> None:
        super().__init__()
        self.config, self.base = config, base
        self.shapes = {teacher: dict(outputs) for teacher, outputs in shapes.items()}
        self.specialists = tuple(teacher for teacher in self.shapes if teacher != base)
        for teacher in self.specialists:
            check_outputs(self.shapes[base], self.shapes[teacher], teacher, f"base {base!r}")
        self.frozen = False
        self.register_buffer("is_frozen", torch.tensor(False))
        self.register_load_state_dict_post_hook(_restore_frozen)  # type: ignore[no-untyped-call]

    def forward(self, targets: Targets, weights: Weights | None = None) -> Outputs:
        """U of every teacher in `targets`, by output: float32 [B, D] or [B, P, D] on the base's grid.

        Args:
            targets: standardised targets by teacher and output.
            weights: row weights [B] by teacher. With them, a space in training that is not frozen normalises by the
                batch and moves its running statistics; without them it uses the running ones as they are.
        """
        raise NotImplementedError

    def objective(self, anchor: Mapping[str, Tensor], targets: Targets, weights: Weights) -> Terms:
        """The terms alone of `learn`."""
        return self.learn(anchor, targets, weights)[1]

    def learn(
        self,
        anchor: Mapping[str, Tensor],  # noqa: ARG002
        targets: Targets,
        weights: Weights,
    ) -> tuple[Outputs, Terms]:
        """What `forward` gives, and the terms of the maps' own objective, whose sum is what to minimise.

        Args:
            anchor: what u is drawn to, z'_base or z', by output; no gradient flows into it.
            targets: standardised targets by teacher and output.
            weights: row weights [B] by teacher; the base's apply to the anchor.

        Returns:
            u, and float32 [] by name, each times its weight: `anchor`, `reconstruction`, `variance`, `covariance`,
            means over outputs and specialists; a term of weight 0 is left out. No terms where nothing is learned.
        """
        return self(targets, weights), {}

    def restorations(self, targets: Targets) -> Restorations:
        """By specialist and output: the target as read back from u, and the target itself, on one grid.

        Empty for a space without decoders.
        """
        raise NotImplementedError

    def freeze(self) -> None:
        """Make the maps final: normalisation statistics fixed, no gradients."""
        self.frozen = True
        self.is_frozen.fill_(True)
        self.requires_grad_(False)


class _Code(NamedTuple):
    """A target [B, (T,) C] and its normalised map v [B, (T,) D] on one grid, the variance normalised by, and u."""

    target: Tensor
    v: Tensor
    variance_D: Tensor
    u: Tensor


class LearnedSpace(SharedSpace):
    """Modes `pretrained`, `joint` and `untrained`: v = normalised g(target), and decoders d back to the target.

    g and d are MLPs; the normalisation is affine-free. A map is worked on at the coarser of its own grid and the
    base's; u is v on the base's. The terms are l(stop(anchor), u), l(d(v), target), VICReg's variance of
    g's own output and its covariance of v (Bardes et al. 2022). `untrained` takes no gradient, but needs batches for
    its statistics.
    """

    def __init__(self, config: UnifyConfig, base: str, shapes: Mapping[str, Shapes], loss: LossConfig) -> None:
        super().__init__(config, base, shapes)
        self.loss = loss
        self.maps, self.decoders, self.norms = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for teacher in self.specialists:
            for output, shape in self.shapes[teacher].items():
                name, channels = slot(teacher, output), self.shapes[base][output].channels
                self.maps[name] = Projector(shape.channels, config.hidden, channels, norm=False)
                self.norms[name] = UnitVariance(channels)
                if config.mode != "untrained" and config.reconstruction:
                    self.decoders[name] = Projector(channels, config.hidden, shape.channels, norm=False)
        if config.mode == "untrained":
            self.requires_grad_(False)

    def forward(self, targets: Targets, weights: Weights | None = None) -> Outputs:
        """As `SharedSpace.forward` says."""
        return self._placed(self._codes(targets, weights), targets)

    def learn(self, anchor: Mapping[str, Tensor], targets: Targets, weights: Weights) -> tuple[Outputs, Terms]:
        """As `SharedSpace.learn` says."""
        codes = self._codes(targets, weights)
        placed = self._placed(codes, targets)
        if self.config.mode == "untrained":
            return placed, {}
        collected: dict[str, list[Tensor]] = {}
        for teacher, outputs in codes.items():
            # An anchor made from a masked row of the base means nothing.
            anchored_B = weights[teacher] * weights[self.base] if self.base in weights else weights[teacher]
            for output, code in outputs.items():
                terms = self._terms(slot(teacher, output), code, weights[teacher])
                terms["anchor"] = weighted_mean(row_loss(code.u, anchor[output].detach(), self.loss), anchored_B)
                for name, term in terms.items():
                    collected.setdefault(name, []).append(term / len(outputs))
        return placed, {name: torch.stack(terms).sum() / len(codes) for name, terms in collected.items()}

    def _terms(self, name: str, code: _Code, weight_B: Tensor) -> Terms:
        """The weighted terms of one output of one specialist, without its anchor."""
        config, terms = self.config, {}
        if config.reconstruction:
            lost_B = row_loss(self.decoders[name](code.v), code.target, self.loss)
            terms["reconstruction"] = config.reconstruction * weighted_mean(lost_B, weight_B)
        if config.variance:
            terms["variance"] = config.variance * variance_term(code.variance_D)
        if config.covariance:
            terms["covariance"] = config.covariance * covariance_term(code.v, weight_B)
        return terms

    def restorations(self, targets: Targets) -> Restorations:
        """As `SharedSpace.restorations` says."""
        if not self.decoders:
            return {}
        return {
            teacher: {o: (self.decoders[slot(teacher, o)](code.v), code.target) for o, code in outputs.items()}
            for teacher, outputs in self._codes(targets, None).items()
        }

    def freeze(self) -> None:
        """As `SharedSpace.freeze` says."""
        super().freeze()
        for norm in self.norms.values():
            assert isinstance(norm, UnitVariance)
            norm.frozen = True

    def _codes(self, targets: Targets, weights: Weights | None) -> dict[str, dict[str, _Code]]:
        codes: dict[str, dict[str, _Code]] = {}
        for teacher in (name for name in self.specialists if name in targets):
            weight_B = None if weights is None else weights[teacher]
            codes[teacher] = {}
            for output, own in self.shapes[teacher].items():
                base, name = self.shapes[self.base][output], slot(teacher, output)
                working = own if own.tokens <= base.tokens else base
                target = onto_grid(targets[teacher][output], own, working).float()
                v, variance_D = self.norms[name](self.maps[name](target), weight_B)
                codes[teacher][output] = _Code(target, v, variance_D, onto_grid(v, working, base))
        return codes

    def _placed(self, codes: Mapping[str, Mapping[str, _Code]], targets: Targets) -> Outputs:
        placed = {teacher: {o: code.u for o, code in outputs.items()} for teacher, outputs in codes.items()}
        if self.base in targets:
            placed[self.base] = {o: targets[self.base][o].float() for o in self.shapes[self.base]}
        return placed


def _restore_frozen(space: nn.Module, _: Any) -> None:
    assert isinstance(space, SharedSpace)
    if bool(space.is_frozen):
        space.freeze()
