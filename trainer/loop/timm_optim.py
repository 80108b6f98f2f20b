"""timm's optimisers, as far as they are not public: the one module that reaches into its private parts.

Fits timm 1.0.23 to 1.0.x; a test holds it against the installed release.
"""

from typing import Any, Final

import torch
from timm.optim._optim_factory import create_optimizer_v2
from timm.optim._param_groups import param_groups_weight_decay
from timm.optim.muon import _COEFFICIENTS, _is_suitable_for_muon, get_lr_scale, resolve_ns_coefficients
from timm.optim.muon import Muon as TimmMuon
from timm.optim.muon import zeropower_via_newtonschulz as _zeropower
from torch import Tensor

RELEASES: Final = ("1.0.23", "1.1")
"""From the first, and before the second."""

__all__ = [
    "RELEASES",
    "TimmMuon",
    "create_optimizer_v2",
    "is_matrix",
    "orthogonalise",
    "param_groups_weight_decay",
    "rate_scale",
]


def is_matrix(parameter: Tensor) -> bool:
    """Whether timm orthogonalises the steps of a parameter: a matrix or a filter bank."""
    return bool(_is_suitable_for_muon(parameter))


def orthogonalise(updates: Tensor, group: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The nearest orthogonal matrices of `updates` [n, rows, columns], by the Newton-Schulz steps of a group."""
    coefficients = resolve_ns_coefficients(group["ns_coefficients"], _COEFFICIENTS)
    found: Tensor = _zeropower(updates, group["ns_steps"], coefficients, eps=group["eps"], dtype=dtype)
    return found


def rate_scale(shape: tuple[int, int], group: dict[str, Any]) -> float:
    """What the learning rate of a matrix is multiplied by."""
    return float(get_lr_scale(torch.Size(shape), group["adjust_lr_fn"]))
