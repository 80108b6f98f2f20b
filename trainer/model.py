"""The whole of what is trained: student, projectors and shared space, and the loss between them.

    L = sum_t c_t (L_s2t(t) + lu L_t2s(t)) / sum_t c_t + lk L_keep

per row, then averaged over rows by weight (`docs/architecture.md`, after KPU, arXiv 2508.14707). A row that a teacher
masks counts for the others only.

Letters: B rows of a batch, N teachers, D channels of the base.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kpu.trust.code import CodeLoader
from trainer.config import TrainConfig
from trainer.data.corpus import TeacherInfo
from trainer.data.loading import Batch, move
from trainer.data.shapes import OutputShape
from trainer.objective.balance import coefficients, uniforms
from trainer.objective.losses import row_loss, weighted_mean
from trainer.objective.normalize import Normalizer, make_normalizer
from trainer.objective.projectors import Projectors, slot
from trainer.objective.spaces import make_space
from trainer.objective.unify import SharedSpace
from trainer.students import BaseInfo, Student, make_student

Features = dict[str, Tensor]


@dataclass(frozen=True)
class Losses:
    """The terms of one batch, 0-d float32 tensors; by teacher where they have one. Nothing here waits for the device.

    `features` is the student's output, for gradients with respect to it.
    """

    total: Tensor
    student_to_teacher: dict[str, Tensor]
    teacher_to_student: dict[str, Tensor]
    preserve: Tensor
    space: dict[str, Tensor]
    features: Features

    def terms(self) -> dict[str, Tensor]:
        """Every term by a flat name, detached."""
        named = {"loss": self.total, "preserve": self.preserve}
        named |= {f"s2t/{name}": value for name, value in self.student_to_teacher.items()}
        named |= {f"t2s/{name}": value for name, value in self.teacher_to_student.items()}
        named |= {f"space/{name}": value for name, value in self.space.items()}
        return {name: value.detach() for name, value in named.items()}


class Inheritance(nn.Module):
    """A student, the projectors from it to every teacher, and the shared space that teachers are brought to.

    `codes` runs the code of a student that has some; by default where the user's list has it.

    The buffers of `normalizers` (centres, scales, PHI-S matrices) belong to the state, so that a run keeps those it
    was trained with.
    """

    def __init__(
        self, config: TrainConfig, sources: Mapping[str, TeacherInfo], codes: CodeLoader | None = None
    ) -> None:
        super().__init__()
        self.config, self.base = config, config.base
        self.teachers = tuple(sources)
        base = sources[config.base]
        self.base_shapes = {output: base.shapes[output] for output in config.outputs}
        self.student: Student = make_student(
            config.student, BaseInfo(base.spec, base.shapes, base.statistics, base.seed), config.outputs, codes
        )
        shapes = {name: {o: source.shapes[o] for o in config.outputs} for name, source in sources.items()}
        self.projectors = Projectors(self.student.shapes, shapes, config.projector)
        kind = config.targets.normalize
        self.normalizers = nn.ModuleDict(
            {
                slot(name, o): make_normalizer(kind, source.statistics[o], config.seed, name=f"{name}/{o}")
                for name, source in sources.items()
                for o in config.outputs
            }
        )
        self.space: SharedSpace | None = make_space(config.unify, config.base, shapes, config.seed, loss=config.loss)
        self.readout = nn.ModuleDict(
            {
                _key(output): _Readout(self.student.shapes[output], self.base_shapes[output])
                for output in config.outputs
                if self.space is not None and config.student.concat
            }
        )

    def settle_space(self) -> None:
        """Make the maps of the shared space final, unless they learn along with the student."""
        if self.space is not None and self.config.unify.mode != "joint":
            self.space.freeze()

    def normalizer(self, teacher: str, output: str) -> Normalizer:
        """The map between standardised features of a teacher's output and its targets."""
        found = self.normalizers[slot(teacher, output)]
        assert isinstance(found, Normalizer)
        return found

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Row weights float32 [B] by teacher; a student that sees the base alone knows nothing of a row it masks."""
        if self.student.needs_images:
            return batch.weights
        return {name: weight_B * batch.weights[self.base] for name, weight_B in batch.weights.items()}

    def encode(self, batch: Batch) -> Features:
        """The student's features of a batch."""
        features: Features = self.student(batch.targets[self.base], batch.images)
        return features

    def predict(self, features: Features, teacher: str) -> Features:
        """Standardised features of a teacher as its projector sees them in the student's."""
        predicted = self.projectors(features, teacher)
        return {o: self.normalizer(teacher, o).standardised(value.float()) for o, value in predicted.items()}

    def forward(self, batch: Batch) -> Losses:
        """The loss of a batch and its terms, in float32 whatever the precision of the forward pass."""
        config, names, weights = self.config, self.teachers, self.weights(batch)
        features = self.encode(batch)
        targets = {
            name: {o: self.normalizer(name, o)(batch.targets[name][o]) for o in config.outputs} for name in names
        }
        direct_BN = torch.stack(
            [self._distance(self.projectors(features, name), targets[name]) for name in names], dim=1
        )
        valid_BN = torch.stack([weights[name] for name in names], dim=1)
        space: dict[str, Tensor] = {}
        total_BN, back_BN = direct_BN, None
        if self.space is not None:
            latent = {o: self.readout[_key(o)](z) if _key(o) in self.readout else z for o, z in features.items()}
            standardised = {name: {o: batch.targets[name][o] for o in config.outputs} for name in names}
            if config.unify.mode == "joint" and self.training:
                unified, space = self.space.learn(latent, standardised, weights)
            else:
                unified = self.space(standardised)
            back_BN = torch.stack(
                [self._distance(latent, {o: u.detach() for o, u in unified[name].items()}) for name in names], dim=1
            )
            total_BN = total_BN + config.unify.weight * back_BN
        count_BN = self._coefficients(batch, direct_BN.detach(), valid_BN)
        share_BN = count_BN / count_BN.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        any_B = valid_BN.amax(dim=1)
        total = weighted_mean((share_BN * total_BN).sum(dim=1), any_B) + sum(space.values(), any_B.new_zeros(()))
        keep = self._preserve(features, batch)
        if config.preserve.weight > 0:
            total = total + config.preserve.weight * keep

        def means(loss_BN: Tensor | None) -> dict[str, Tensor]:
            if loss_BN is None:
                return {}
            return {name: weighted_mean(loss_BN[:, i], valid_BN[:, i]) for i, name in enumerate(names)}

        return Losses(total, means(direct_BN), means(back_BN), keep, space, features)

    def _distance(self, predicted: Features, targets: Features) -> Tensor:
        """Pair loss of each row, [B], float32: the mean over outputs."""
        losses = [row_loss(predicted[output], targets[output], self.config.loss) for output in self.config.outputs]
        return torch.stack(losses).mean(dim=0)

    def _coefficients(self, batch: Batch, losses_BN: Tensor, weights_BN: Tensor) -> Tensor:
        """How much each teacher counts in each row, float32 [B, N]."""
        randoms_BN: Tensor | None = None
        if self.config.balance.name != "uniform":
            drawn_BN = np.empty(losses_BN.shape)
            for epoch in np.unique(batch.epochs):
                places = np.flatnonzero(batch.epochs == epoch)
                drawn = [uniforms(self.config.seed, int(epoch), batch.rows[places], name) for name in self.teachers]
                drawn_BN[places] = np.stack(drawn, axis=1)
            randoms_BN = move(torch.from_numpy(drawn_BN), losses_BN.device)
        return coefficients(self.config.balance, losses_BN, weights_BN > 0, randoms_BN)

    def _preserve(self, features: Features, batch: Batch) -> Tensor:
        """How far the student is from the base, channel for channel; 0 if the base is a part of it as it is."""
        base, weight_B = batch.targets[self.base], batch.weights[self.base]
        if any(features[o].shape[-1] != base[o].shape[-1] for o in self.config.outputs):
            return weight_B.new_zeros(())
        return weighted_mean(self._distance(features, {o: base[o] for o in self.config.outputs}), weight_B)


class _Readout(nn.Module):
    """Where the student is wider than the base: a linear map to the base's channels, at first the base's own part."""

    def __init__(self, student: OutputShape, base: OutputShape) -> None:
        super().__init__()
        self.linear = nn.Linear(student.channels, base.channels, bias=False)
        with torch.no_grad():
            self.linear.weight[:, : base.channels] = torch.eye(base.channels)

    def forward(self, z: Tensor) -> Tensor:
        """[..., D'] to [..., D]."""
        mapped: Tensor = self.linear(z)
        return mapped


def _key(output: str) -> str:
    """A name that a module may have."""
    return output.replace(".", "_")
