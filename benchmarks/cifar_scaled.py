"""A CIFAR ResNet-20 whose features are multiplied by a constant: the same knowledge in another unit.

What a student inherits from it must not depend on that unit. Used by `benchmarks/inheritance.py`.
"""

from collections.abc import Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def _cifar_resnet() -> Any:
    spec = spec_from_file_location("cifar_resnet", Path(__file__).parents[1] / "examples/cifar_resnet.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_MODULE = _cifar_resnet()


class Scaled(_MODULE.CifarResNet):  # type: ignore[misc, name-defined]
    """`global` [B, 64] and `patch` [B, 64, 8, 8] of a ResNet-20, times `factor`; its head undoes it."""

    factor = 1.0

    @property
    def head(self) -> nn.Linear:
        """The classifier on `global`."""
        head = nn.Linear(self.linear.in_features, self.linear.out_features)
        with torch.no_grad():
            head.weight.copy_(self.linear.weight / self.factor)
            head.bias.copy_(self.linear.bias)
        return head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """As the ResNet's own, in another unit."""
        features = super().forward(images)
        return {name: features[name] * self.factor for name in ("global", "patch")}


def times_10(state_dict: Mapping[str, Tensor] | None = None) -> Scaled:
    """Features ten times as large."""
    return _scaled(10.0, state_dict)


def by_10(state_dict: Mapping[str, Tensor] | None = None) -> Scaled:
    """Features a tenth as large."""
    return _scaled(0.1, state_dict)


def _scaled(factor: float, state_dict: Mapping[str, Tensor] | None) -> Scaled:
    classes = 10 if state_dict is None else len(state_dict["linear.weight"])
    model = Scaled(3, classes)
    model.factor = factor
    return model
