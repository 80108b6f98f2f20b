"""Muon (Jordan et al. 2024) as timm has it, but for how matrices go through it: those of one shape together.

timm orthogonalises each by itself, in bfloat16. Most launches of a training step on a GPU are then the optimiser's, and
a processor without bfloat16 arithmetic spends most of a step on emulating it (`docs/decisions.md`).
"""

from typing import Any

import torch
from torch import Tensor

from trainer.loop.timm_optim import TimmMuon, is_matrix, orthogonalise, rate_scale


class Muon(TimmMuon):
    """Steps of matrices and filter banks are made orthogonal, in float32 on a CPU; vectors take timm's NAdamW steps.

    State and hyperparameters are timm's.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; the gradients of matrices are gone afterwards. There is no `closure`."""
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None and self._is_matrix(parameter):
                    rows = parameter.shape[0]
                    alike.setdefault((rows, parameter.numel() // rows), []).append(parameter)
            for shape, parameters in alike.items():
                self._step_alike(group, shape, parameters)
        return super().step(closure)  # type: ignore[no-untyped-call]

    def _step_alike(self, group: dict[str, Any], shape: tuple[int, int], parameters: list[Tensor]) -> None:
        """One step of all matrices of one shape."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self._momentum(parameter) for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"])  # Nesterov's
        orthogonal = orthogonalise(
            torch.stack([update.reshape(shape) for update in updates]),
            group,
            torch.bfloat16 if parameters[0].is_cuda else torch.float32,
        ).float()
        rate = group["lr"] * rate_scale(shape, group)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        steps = [step.reshape(parameter.shape) for step, parameter in zip(orthogonal, parameters, strict=True)]
        torch._foreach_add_(parameters, steps, alpha=-rate)
        for parameter in parameters:
            parameter.grad = None

    def _is_matrix(self, parameter: Tensor) -> bool:
        """Whether `parameter` is a matrix or a filter bank, which timm, too, remembers in its state."""
        state = self.state[parameter]
        if "use_muon" not in state:
            state["use_muon"] = is_matrix(parameter)
        return bool(state["use_muon"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer
