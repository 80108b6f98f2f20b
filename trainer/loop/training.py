"""The state of a training and one step of it."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from kpu.errors import TrainingError
from trainer.config import TrainConfig
from trainer.data.loading import Batch
from trainer.loop.optim import (
    clip_gradients,
    learning_rate,
    make_average,
    make_optimizer,
    make_schedule,
    optimizer_name,
    optimizer_state,
)
from trainer.loop.world import World
from trainer.model import Inheritance, Losses
from trainer.objective.losses import over_workers, worker_count
from trainer.run.checkpoint import Checkpoint, state_of


class Training:
    """Model, optimiser, schedule and moving average; `step` counts the steps that are done.

    Where the configuration says `compile`, the student is compiled at its first step; the losses on its features are
    not, so that each teacher's gradient there can be measured.
    """

    def __init__(self, config: TrainConfig, model: Inheritance, world: World, steps: int) -> None:
        self.config, self.model, self.world, self.steps = config, model, world, steps
        self.step = 0
        lr = learning_rate(config)
        self.optimizer = make_optimizer(model, optimizer_name(config), lr, config.optim.weight_decay)
        self.schedule = make_schedule(self.optimizer, lr, config.optim.warmup, steps)
        self.average = make_average(model, config.optim, config.batch_size * config.optim.accumulate)
        self.gradient_norm: dict[str, Tensor] = {}
        self.gradient_cosine: dict[str, dict[str, Tensor]] = {}
        self._bad = torch.zeros((), dtype=torch.bool, device=world.device)
        if world.size > 1 and world.device.type == "cuda":
            synchronise(model)
        if config.compile:
            model.student.compile()
        self._forward: Any = model
        if world.size > 1:
            where = [world.device.index] if world.device.type == "cuda" else None
            self._forward = nn.parallel.DistributedDataParallel(model, where, find_unused_parameters=True)

    def advance(self, batches: Sequence[Batch], *, measure: bool) -> Losses:
        """One step on `batches`, whose gradients are averaged; the losses of the last one.

        With `measure`, `gradient_norm` and `gradient_cosine` are set to what `measure_gradients` finds.
        """
        self.schedule.step_update(self.step)
        self.model.train()
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            hold = self._forward.no_sync() if self.world.size > 1 and not last else nullcontext()
            with hold:
                with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.world.precision == "bf16"):
                    losses: Losses = self._forward(batch)
                if measure and last:
                    self.gradient_norm, self.gradient_cosine = measure_gradients(losses)
                if losses.total.requires_grad:
                    (losses.total / len(batches)).backward()
            self._bad |= ~torch.isfinite(losses.total.detach())
        norm = clip_gradients(self.model.parameters(), self.config.optim.clip)
        self._bad |= ~torch.isfinite(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model)
        self.step += 1
        return losses

    def check_finite(self) -> None:
        """Waits for the device.

        Raises:
            TrainingError: a loss or a gradient since the last check was not finite.
        """
        if self._bad:
            raise TrainingError(
                f"step {self.step}: expected a finite loss and gradient, found NaN or infinity; lower optim.lr, set "
                "optim.clip, or use precision fp32, and start a new run; --resume goes on from the last checkpoint"
            )

    def checkpoint(self, position: int) -> Checkpoint:
        """The state now."""
        average = None if self.average is None else state_of(self.average.module)
        state = optimizer_state(self.optimizer)
        return Checkpoint(self.step, position, state_of(self.model), average, state, self._generators())

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to the state of a checkpoint."""
        self.step = checkpoint.step
        self.model.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        if self.average is not None and checkpoint.average is not None:
            self.average.module.load_state_dict(checkpoint.average)
        torch.set_rng_state(checkpoint.generators["cpu"])
        if self.world.device.type == "cuda" and "cuda" in checkpoint.generators:
            torch.cuda.set_rng_state(checkpoint.generators["cuda"], self.world.device)

    def _generators(self) -> dict[str, Tensor]:
        found = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state(self.world.device)
        return found

    @property
    def trained(self) -> Inheritance:
        """The model to keep: the moving average, if there is one."""
        kept = self.model if self.average is None else self.average.module
        assert isinstance(kept, Inheritance)
        return kept


def synchronise(model: nn.Module) -> None:
    """Have every batch normalisation within `model` take its statistics over all workers, whose GPUs it needs.

    Parameters, buffers, their names and order stay, and so does the activation that timm's own layers end with. `model`
    is no such layer itself.
    """
    convert_sync_batchnorm(model)


def measure_gradients(losses: Losses) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Norms by teacher, and cosines by pair, of the gradients at the student's features that teachers' losses have.

    0-d tensors, over all workers. A pair of which one has no gradient has a cosine of 0. Nothing is measured of a
    student that does not learn.
    """
    features = [feature for feature in losses.features.values() if feature.requires_grad]
    if not features:
        return {}, {}
    names, flat = list(losses.student_to_teacher), []
    for loss in losses.student_to_teacher.values():
        gradients = torch.autograd.grad(loss, features, retain_graph=True, materialize_grads=True)
        flat.append(torch.cat([gradient.float().flatten() for gradient in gradients]))
    gradients_KN = torch.stack(flat)
    products_KK = over_workers(gradients_KN @ gradients_KN.T) / worker_count() ** 2
    norms_K = products_KK.diagonal().sqrt()
    cosines_KK = products_KK / torch.outer(norms_K, norms_K).clamp(min=torch.finfo(torch.float32).tiny)
    norms = dict(zip(names, norms_K, strict=True))
    return norms, {a: {names[j]: cosines_KK[i, j] for j in range(i + 1, len(names))} for i, a in enumerate(names[:-1])}
