"""How `global` is pooled from tokens: what `pool` asks for, and the name of what a model does by itself.

Letters: B images, D channels, h and w the grid.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from kpu.errors import TeacherError

CLASS, MEAN, BOTH = "class token", "mean of patches", "class token and mean of patches"
_RELATIVE = {torch.float32: 1e-4}  # of the largest value
_RELATIVE_REDUCED = 2e-2


def pool_tokens(pool: str, class_BD: Tensor | None, map_BDhw: Tensor | None, who: str) -> Tensor:
    """`cls`, `mean` or `cls+mean` [B, D or 2 D] of a model's final tokens.

    Raises:
        TeacherError: the model has no class token, or no map to take the mean of.
    """
    if class_BD is None and pool != "mean":
        raise TeacherError(f"{who}: pool: {pool}: expected a model with a class token, found none; use auto or mean")
    if map_BDhw is None and pool != "cls":
        raise TeacherError(f"{who}: pool: {pool}: expected a model whose tokens map the image; use auto or cls")
    parts = {"cls": class_BD, "mean": None if map_BDhw is None else map_BDhw.mean((2, 3))}
    return torch.cat([part for name in pool.split("+") if (part := parts[name]) is not None], dim=1)


def name_pool(global_BD: Tensor, class_BD: Tensor | None, map_BDhw: Tensor | None, otherwise: str) -> str:
    """What `global` is, by comparing it with what the tokens give; `otherwise` where it is none of that."""
    candidates: Mapping[str, Tensor | None] = {
        CLASS: class_BD,
        MEAN: None if map_BDhw is None else map_BDhw.mean((2, 3)),
        "maximum of patches": None if map_BDhw is None else map_BDhw.amax((2, 3)),
        BOTH: None if class_BD is None or map_BDhw is None else torch.cat([class_BD, map_BDhw.mean((2, 3))], dim=1),
    }
    return next((name for name, each in candidates.items() if each is not None and _same(global_BD, each)), otherwise)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    tolerance = _RELATIVE.get(one.dtype, _RELATIVE_REDUCED) * float(other.float().abs().max())
    return float((one.float() - other.float()).abs().max()) <= tolerance
