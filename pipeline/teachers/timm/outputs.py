"""What a timm model emits, read as `global`, `patch` and layers.

Letters: B images, N tokens with prefix, D channels, H and W the image, h and w the grid.
"""

from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from kpu.errors import TeacherError
from pipeline.teachers.backbone import map_of_tokens
from pipeline.teachers.pooling import CLASS, MEAN, name_pool, pool_tokens

_MOST_PREFIX_TOKENS = 16
_ATTENTION_POOL = "AttentionPool"  # in the name of a module's class
_CLASS_TOKEN = "cls_token"  # begins the name of a parameter; CoaT has one a stage, with its number
_NAMES = {
    "token": CLASS,
    "avg": MEAN,
    "max": "maximum of patches",
    "avgmax": "mean and maximum of patches, averaged",
    "catavgmax": "mean and maximum of patches",
    "map": "attention pool",
    "": "the model's own head",
}
_FURTHER = ", then the head's own layers"


class TimmFeatures(nn.Module):
    """All wanted outputs of a timm model in one forward pass. After the first, `pooling` says what `global` is."""

    def __init__(
        self, model: nn.Module, outputs: Collection[str], layers: tuple[int, ...], who: str, pool: str = "auto"
    ) -> None:
        super().__init__()
        self.model: Any = model
        self._with_global, self._with_patch = "global" in outputs, "patch" in outputs
        self._layers, self._who, self._pool = layers, who, pool
        self.pooling: str | None = None

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        if self._layers:
            ordered = sorted(self._layers)  # timm returns them in this order, whatever is asked
            final, maps = self.model.forward_intermediates(x_BCHW, indices=ordered)
            result |= {f"layer{i}.patch": each for i, each in zip(ordered, maps, strict=True)}
        else:
            final = self.model.forward_features(x_BCHW)
        image = x_BCHW.shape[2], x_BCHW.shape[3]
        if self._with_patch:
            result["patch"] = self._required_map(final, image)
        if self._with_global:
            result["global"] = self._global(final, image)
        return result

    def stated(self, x_BCHW: Tensor) -> tuple[str, ...]:
        """Maps that timm itself lays out: layers, and `patch` where it comes as a map or equals timm's last."""
        layers = tuple(f"layer{layer}.patch" for layer in self._layers)
        if not self._with_patch:
            return layers
        final, own = self.model.forward_features(x_BCHW), None
        if final.ndim == 4:
            return (*layers, "patch")
        with suppress(Exception):  # not every model has intermediates, or a norm to apply
            own = self.model.forward_intermediates(x_BCHW, norm=True, intermediates_only=True)[-1]
        ours = self._required_map(final, (x_BCHW.shape[2], x_BCHW.shape[3]))
        same = own is not None and own.shape == ours.shape and torch.allclose(own, ours, rtol=1e-4, atol=1e-4)
        return (*layers, "patch") if same else layers

    def _global(self, final: Any, image: tuple[int, int]) -> Tensor:
        """What the classifier sees, or what `pool` asks for."""
        if self._pool == "pooler":
            raise TeacherError(f"{self._who}: pool: expected auto, cls, mean or cls+mean of a timm model, found pooler")
        own: Tensor | None = self.model.forward_head(final, pre_logits=True) if self._pool == "auto" else None
        if own is not None and self.pooling is not None:
            return own
        map_BDhw, class_BD = self._map(final, image), self._class(final)
        result = own if own is not None else pool_tokens(self._pool, class_BD, map_BDhw, self._who)
        if self.pooling is None:
            self.pooling = name_pool(result, class_BD, map_BDhw, _stated_pool(self.model))
            prefix = getattr(self.model, "num_prefix_tokens", 0)
            if class_BD is not None and prefix > 1 and torch.allclose(result, final[:, :prefix].mean(1), atol=1e-4):
                self.pooling = "mean of class and distillation tokens"
        return result

    def _class(self, final: Any) -> Tensor | None:
        """The class token [B, D], the first of the prefix tokens, where the model has one."""
        own = (name for name, _ in self.model.named_parameters(recurse=False))
        has_one = any(name.startswith(_CLASS_TOKEN) for name in own) or getattr(self.model, "has_class_token", False)
        tokens = isinstance(final, Tensor) and final.ndim == 3 and getattr(self.model, "num_prefix_tokens", 1) > 0
        return final[:, 0] if has_one and tokens else None

    def _map(self, final: Any, image: tuple[int, int]) -> Tensor | None:
        """The final features as [B, D, h, w]; None if they form no map."""
        if isinstance(final, Tensor) and final.ndim == 4:
            return final.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else final
        if isinstance(final, Tensor) and final.ndim == 3:
            stated = getattr(self.model, "num_prefix_tokens", None)
            for prefix in range(_MOST_PREFIX_TOKENS) if stated is None else (stated,):
                found = map_of_tokens(final, prefix, image)
                if found is not None:
                    return found
        return None

    def _required_map(self, final: Any, image: tuple[int, int]) -> Tensor:
        found = self._map(final, image)
        if found is None:
            shape = list(final.shape) if isinstance(final, Tensor) else type(final).__name__
            raise TeacherError(
                f"{self._who}: patch: expected final features that map the image, found {shape}; leave patch out "
                "(outputs: [global])"
            )
        return found


def _stated_pool(model: Any) -> str:
    """What timm calls the pooling, for a model whose pooled features are not plainly its tokens."""
    if any(_ATTENTION_POOL in type(part).__name__ for part in model.modules()):
        return _NAMES["map"]
    places = (model, getattr(model, "head", None), getattr(model, "classifier", None))
    found = next((each for place in places if (each := getattr(place, "global_pool", None)) is not None), "")
    kind = found if isinstance(found, str) else getattr(found, "pool_type", "")
    return _NAMES.get(kind, kind) + (_FURTHER if kind else "")
