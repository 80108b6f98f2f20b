"""Weights files of timm models: converted to timm's names, and the classes that they hold."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from kpu.torch.weights import differences


def convert(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights by timm's names: those of the original publisher, or of another image size, go through timm's own filter.

    Weights that fit `model`, or that its filter does not know, are returned as they are.
    """
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if filter_fn is not None and differences(model, state):
        with suppress(Exception):  # it knows other files than this one; loading reports what does not fit
            converted: Mapping[str, Tensor] = filter_fn(dict(state), model)
            return converted
    return state


def count_classes(model: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Classes of the classifier in `state`; 0 if it has none."""
    classifier: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    return next((len(state[f"{name}.weight"]) for name in names if f"{name}.weight" in state), 0)
