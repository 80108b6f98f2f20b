"""What a transformers model emits, read as `global`, `patch` and layers.

Letters: B images, N tokens with those before and after the image's, D channels, H and W the image, h and w the grid.
"""

import inspect
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from kpu.errors import TeacherError
from pipeline.teachers.hf.maps import Facts, Layout, Reading, layout_of, read_facts, reading_of
from pipeline.teachers.pooling import name_pool, pool_tokens

_ATTENTION_POOL = "AttentionPool"  # in the name of a module's class
_CLASS_TOKEN = re.compile("cls|class_(token|emb)")  # in the name of a parameter
_CLASS_APART = "cls_token_value"  # CvT's class token, which is not before the map's; `auto` is the mean all the same
_DECODED = "encoder_last_hidden_state"  # beside `last_hidden_state`, it says that the latter is the decoder's


class HfFeatures(nn.Module):
    """All wanted outputs of a transformers model in one forward pass.

    How its tensors map the image is decided at the first pass, by their shapes and the model's configuration.
    `pooling` then says what `global` is.
    """

    def __init__(
        self,
        model: Any,
        outputs: Collection[str],
        layers: tuple[int, ...],
        size: tuple[int, int],
        who: str,
        pool: str = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self._with_global, self._with_patch = "global" in outputs, "patch" in outputs
        self._layers, self._who, self._pool = layers, who, pool
        self._options: dict[str, Any] = {"output_hidden_states": True} if layers else {}
        self._facts: Facts = read_facts(model.config)
        self._readings: dict[str, Reading] = {}
        self._has_class_token = any(_CLASS_TOKEN.search(key) for key, _ in model.named_parameters())
        self.pooling: str | None = None
        own = getattr(model.config, "image_size", None)
        resized = own is not None and _pair(own) != size
        if resized and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            self._options["interpolate_pos_encoding"] = True

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        found = self.model(pixel_values=x_BCHW, **self._options)
        final, image = _final(found, self._who), (x_BCHW.shape[2], x_BCHW.shape[3])
        result: dict[str, Tensor] = {}
        if self._with_global:
            result["global"] = self._global(found, final, image)
        if self._with_patch:
            result["patch"] = self._as_map("patch", final, image)
        states = self._states(found) if self._layers else []
        layout = layout_of((state.shape for state in states), image, self._facts)
        for layer in self._layers:
            name = f"layer{layer}.patch"
            result[name] = self._as_map(name, states[layer], image, layout)
        return result

    def stated(self, x_BCHW: Tensor) -> tuple[str, ...]:  # noqa: ARG002
        """Maps whose grid, channels and further tokens are all as the model's configuration states."""
        return tuple(name for name, reading in self._readings.items() if reading.stated)

    def _global(self, found: Any, final: Tensor, image: tuple[int, int]) -> Tensor:
        """`summary` or `pooler_output` where there is one, else the class token, else the mean over the map."""
        own = _first_of(found, "summary", "pooler_output") if self._pool in ("auto", "pooler") else None
        if self._pool == "pooler" and own is None:
            raise TeacherError(
                f"{self._who}: pool: pooler: expected a model that pools by itself, found none; use auto, cls or mean"
            )
        if own is not None and self.pooling is not None:
            return own.flatten(1)  # type: ignore[no-any-return]
        reading = self._reading("patch", final, image)
        if own is None and reading is None:
            raise self._no_map("global", final, image)
        map_BDhw = reading.map(final) if reading is not None else None
        has_class = reading is not None and reading.has_class and self._has_class_token
        apart = _first_of(found, _CLASS_APART)
        class_BD = final[:, 0] if has_class else None if apart is None else apart.flatten(1)
        pool = ("cls" if has_class else "mean") if self._pool in ("auto", "pooler") else self._pool
        result = own.flatten(1) if own is not None else pool_tokens(pool, class_BD, map_BDhw, self._who)
        if self.pooling is None:
            self.pooling = name_pool(result, class_BD, map_BDhw, self._name_of_pooler(found))
        return result

    def _name_of_pooler(self, found: Any) -> str:
        if _first_of(found, "summary") is not None:
            return "summary"
        attends = any(_ATTENTION_POOL in type(part).__name__ for part in self.model.modules())
        return "attention pool" if attends else "pooler output"

    def _states(self, found: Any) -> list[Tensor]:
        """The map after each layer; where the library gives them reshaped to the image, these are taken."""
        states = _first_of(found, "reshaped_hidden_states", "hidden_states")
        count = self._facts.layers
        if getattr(self.model.config, "model_type", None) == "pvt":
            raise TeacherError(
                f"{self._who}: layers: expected a hidden state for each layer, found one for each block and the "
                "last one once more: which is which cannot be told; leave layers out"
            )
        if states is None or len(states) not in (count, count + 1):
            raise TeacherError(
                f"{self._who}: layers: expected {count} or {count + 1} hidden states of a model with {count} layers, "
                f"found {'none' if states is None else len(states)}, so which is which cannot be told; leave layers out"
            )
        return list(states[-count:])

    def _as_map(self, name: str, features: Tensor, image: tuple[int, int], layout: Layout | None = None) -> Tensor:
        """[B, D, h, w]."""
        reading = self._reading(name, features, image, layout)
        if reading is None:
            raise self._no_map(name, features, image)
        return reading.map(features)

    def _reading(
        self, name: str, features: Tensor, image: tuple[int, int], layout: Layout | None = None
    ) -> Reading | None:
        found = self._readings.get(name) or reading_of(features.shape, image, self._facts, layout)
        if found is not None:
            self._readings[name] = found
        return found

    def _no_map(self, name: str, features: Tensor, image: tuple[int, int]) -> TeacherError:
        advice = {"patch": "leave patch out (outputs: [global])", "global": "use another model"}
        return TeacherError(
            f"{self._who}: {name}: expected tokens that map the image of {image[0]} x {image[1]} pixels, found "
            f"{list(features.shape)}; {advice.get(name, 'leave layers out')}"
        )


def in_order(model: Any) -> None:
    """Have a masked autoencoder's encoder see all patches, in their order, whatever `mask_ratio` its folder says.

    It keeps a random part of them, in random order, but for pre-training; `noise` is what it sorts them by.
    """
    if not hasattr(model.config, "mask_ratio") or "noise" not in inspect.signature(model.forward).parameters:
        return
    model.config.mask_ratio = 0.0
    height, width = _pair(model.config.patch_size)

    def order(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        x_BCHW = options.get("pixel_values", arguments[0] if arguments else None)
        if options.get("noise") is None and x_BCHW is not None:
            count = (x_BCHW.shape[2] // height) * (x_BCHW.shape[3] // width)
            ranks = torch.arange(count, dtype=torch.float32, device=x_BCHW.device)
            options = {**options, "noise": ranks.expand(len(x_BCHW), count)}
        return arguments, options

    model.register_forward_pre_hook(order, with_kwargs=True)


def _final(found: Any, who: str) -> Tensor:
    """The last hidden state of the image's encoder."""
    emitted = ", ".join(found) if hasattr(found, "keys") else type(found).__name__
    if _first_of(found, _DECODED) is not None or hasattr(found, _DECODED):
        raise TeacherError(
            f"{who}: expected the hidden state of an image encoder, found that of a decoder, whose tokens are object "
            "queries and no places in the image; use the model's encoder as a torch: teacher (docs/teachers.md)"
        )
    final = _first_of(found, "last_hidden_state")
    if final is None:
        raise TeacherError(
            f"{who}: expected an output last_hidden_state, found {emitted}; use the vision tower alone, or a torch: "
            "teacher (docs/teachers.md)"
        )
    return final  # type: ignore[no-any-return]


def _first_of(found: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(found, name, None)) is not None), None)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
