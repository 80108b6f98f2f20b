"""Optimiser, schedule and moving average, from timm's factories."""

from collections.abc import Iterable
from typing import Any, Final

import torch
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from trainer.config import OptimConfig, TrainConfig

_LEARNING_RATES: Final = {"side": 8e-3, "frozen": 8e-3, "parallel": 1e-3, "full": 1e-3}
"""By kind of student, where the configuration says auto (`docs/decisions.md`)."""


def learning_rate(config: TrainConfig) -> float:
    """The largest rate of the schedule."""
    return _LEARNING_RATES[config.student.kind] if config.optim.lr == "auto" else config.optim.lr


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW; vectors (biases, scales of normalisations, gammas) do not decay."""
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model, opt="adamw", lr=lr, weight_decay=weight_decay, filter_bias_and_bn=True
    )
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, lr: float, warmup: float, steps: int) -> CosineLRScheduler:
    """Linear warm-up over the share `warmup` of `steps`, then a cosine to 1/100; a function of the step alone."""
    return CosineLRScheduler(
        optimizer,
        t_initial=steps,
        lr_min=lr / 100,
        warmup_t=min(round(warmup * steps), steps - 1),
        warmup_lr_init=lr / 100,
        warmup_prefix=False,
        t_in_epochs=False,
    )


def make_average(model: nn.Module, config: OptimConfig, rows_per_step: int) -> ModelEmaV3 | None:
    """An exponential moving average of the weights whose half-life is `optim.ema` rows; None where that is 0."""
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
