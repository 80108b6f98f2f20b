"""Optimiser, schedule and moving average, from timm's factories."""

from collections.abc import Iterable
from typing import Any, Final

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.loop.muon import Muon
from trainer.loop.timm_optim import create_optimizer_v2, param_groups_weight_decay
from trainer.sections import OptimConfig

_ON_FEATURES: Final = ("side", "frozen")
_LEARNING_RATES: Final = {("muon", True): 16e-3, ("muon", False): 1e-3, ("adamw", True): 8e-3, ("adamw", False): 1e-3}
"""By optimiser, and whether the student learns on features rather than images (`docs/decisions.md`)."""

_MOMENTUM: Final = 0.9


def optimizer_name(config: TrainConfig) -> str:
    """`adamw` or `muon`."""
    if config.optim.name != "auto":
        return config.optim.name
    return "muon" if config.student.kind in _ON_FEATURES else "adamw"


def learning_rate(config: TrainConfig) -> float:
    """The largest rate of the schedule."""
    if config.optim.lr != "auto":
        return config.optim.lr
    return _LEARNING_RATES[optimizer_name(config), config.student.kind in _ON_FEATURES]


def make_optimizer(model: nn.Module, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, or Muon (Jordan et al. 2024) with Nesterov momentum, whose steps are as long as AdamW's.

    Muon turns the momentum of every matrix and filter bank into the nearest orthogonal one (its update's root mean
    square is then 0.2 of the rate: Liu et al. 2025, arXiv 2502.16982); vectors (biases, scales of normalisations,
    gammas) take NAdamW's steps at the same rate, and never decay.
    """
    if name == "muon":
        groups = param_groups_weight_decay(model, weight_decay)
        return Muon(groups, lr=lr, momentum=_MOMENTUM, nesterov=True)
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model, opt=name, lr=lr, weight_decay=weight_decay, filter_bias_and_bn=True
    )
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, lr: float, warmup: float, steps: int) -> CosineLRScheduler:
    """Linear warm-up over the share `warmup` of `steps`, then a cosine to 1/100; a function of the step alone."""
    return CosineLRScheduler(
        optimizer,
        t_initial=max(steps, 2),  # of one step timm says that there is no schedule, which is so
        lr_min=lr / 100,
        warmup_t=min(round(warmup * steps), steps - 1),
        warmup_lr_init=lr / 100,
        warmup_prefix=False,
        t_in_epochs=False,
    )


def make_average(model: nn.Module, config: OptimConfig, rows_per_step: int) -> ModelEmaV3 | None:
    """An exponential moving average of the weights whose half-life is `optim.ema` rows; None if that is 0."""
    if config.ema == 0:
        return None
    return ModelEmaV3(model, decay=0.5 ** (rows_per_step / config.ema), foreach=True)


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale gradients down to a norm of at most `limit` (0: leave them); the norm before, a 0-d tensor."""
    norm: Tensor = nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
    return norm


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state in host memory, for a checkpoint."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().cpu().clone()
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        if isinstance(value, list):
            return [copied(item) for item in value]
        return value

    state: dict[str, Any] = copied(optimizer.state_dict())
    return state
