"""The shared space that a configuration names."""

from collections.abc import Mapping

import torch

from trainer.objective.pca import PcaSpace
from trainer.objective.projectors import Shapes
from trainer.objective.unify import LearnedSpace, SharedSpace
from trainer.sections import LossConfig, UnifyConfig


def make_space(
    config: UnifyConfig, base: str, shapes: Mapping[str, Shapes], seed: int, *, loss: LossConfig | None = None
) -> SharedSpace | None:
    """The space that `unify.mode` names, its maps drawn from `seed` alone; None for `off`, or where it weighs nothing.

    Args:
        config: the section `unify`.
        base: name of the base, which is in `shapes`.
        shapes: shapes of the targets by teacher and output; each output is one of the base's.
        seed: of the initial maps.
        loss: weights of the pair loss within the maps' own objective; None for the default.

    Raises:
        MismatchError: a specialist has an output that the base lacks, or one is a map and the other a vector.
    """
    if config.mode == "off" or config.weight == 0:
        return None
    if config.mode == "pca":
        return PcaSpace(config, base, shapes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LearnedSpace(config, base, shapes, loss or LossConfig())
