"""A classifier as one linear layer on `global`, where it is one: whether it is, is tried on images later."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.classifier import ClassifierHead, ClNormMlpClassifierHead, NormMlpClassifierHead
from torch import Tensor, nn

_WHOLE_HEADS = (ClassifierHead, NormMlpClassifierHead, ClNormMlpClassifierHead)  # `global` is what their `fc` takes
_WITHOUT_EFFECT = (nn.Dropout, nn.Identity)


def linear_head(classifier: Any) -> tuple[nn.Linear | None, str | None]:
    """A linear layer that may give a model's answers, or why there is none; neither where there is no classifier.

    Besides a linear layer that is a 1 x 1 convolution, a linear layer behind a batch normalisation, and the mean of
    several of these, on the same features or each on a part of them. Of a whole head of timm's, with its pooling, it
    is the last layer.
    """
    parts = [*classifier] if isinstance(classifier, tuple | list | nn.ModuleList) else [classifier]
    parts = [part.fc if isinstance(part, _WHOLE_HEADS) else part for part in parts]
    parts = [part for part in parts if part is not None and not isinstance(part, nn.Identity)]
    if not parts:
        return None, None
    layers = [_linear(part) for part in parts]
    found = [layer for layer in layers if layer is not None]
    kinds = ", ".join(dict.fromkeys(type(part).__name__ for part in parts))
    if len(found) < len(parts) or len({layer.out_features for layer in found}) > 1:
        return None, f"its classifier ({kinds}) is not one linear layer on global"
    return found[0] if len(found) == 1 else _mean(found), None


def _linear(part: Any) -> nn.Linear | None:
    if isinstance(part, nn.Linear):
        return part
    if isinstance(part, nn.Conv2d):
        plain = part.kernel_size == (1, 1) and part.groups == 1
        return _made(part.weight.flatten(1), part.bias) if plain else None
    children = [*part.children()] if isinstance(part, nn.Module) else []
    children = [child for child in children if not isinstance(child, _WITHOUT_EFFECT)]
    match children:
        case [nn.BatchNorm1d() as norm, nn.Linear() as linear]:
            return _folded(norm, linear)
    layers = [_linear(child) for child in children]
    found = [layer for layer in layers if layer is not None]
    if not found or len(found) < len(layers):
        return None
    return found[0] if len(found) == 1 else _mean(found)


def _folded(norm: nn.BatchNorm1d, linear: nn.Linear) -> nn.Linear | None:
    """One layer for a normalisation by running statistics and a linear layer behind it."""
    if norm.running_mean is None or norm.running_var is None:
        return None
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale + (0 if norm.bias is None else norm.bias.double())
        weight = linear.weight.double()
        bias = weight @ shift + (0 if linear.bias is None else linear.bias.double())
        return _made((weight * scale).float(), bias.float())


def _mean(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer for the mean of several answers."""
    with torch.no_grad():
        weights = [layer.weight / len(layers) for layer in layers]
        same = len({layer.in_features for layer in layers}) == 1
        weight = torch.stack(weights).sum(0) if same else torch.cat(weights, dim=1)
        biases = [layer.bias / len(layers) for layer in layers if layer.bias is not None]
        return _made(weight, torch.stack(biases).sum(0) if biases else None)


def _made(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return linear.requires_grad_(False)
