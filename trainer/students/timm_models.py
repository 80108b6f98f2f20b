"""Models of timm, and their outputs by name.

Letters: B images, N tokens with prefix, T tokens, D channels, H and W the image, h and w the grid.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
from torch import Tensor, nn

from kpu.errors import ConfigError
from kpu.format.timm_args import with_layers
from kpu.torch.timm_weights import convert, count_classes
from kpu.torch.weights import RANDOM, initialise
from kpu.trust.list import tensors_only
from trainer.data.shapes import TokenGrid
from trainer.students.sketch import TooLargeError
from trainer.students.weights import Weights, load_strictly, read_weights

_MOST_PREFIX_TOKENS = 16
_LAYER = re.compile(r"layer(\d+)\.patch")


class TimmOutputs(nn.Module):
    """Outputs of a timm model in one pass, named as a cache names them.

    `global` is what its classifier sees, `patch` the final map without prefix, `layer<i>.patch` the map after block or
    stage i.
    """

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model: Any = model
        self.outputs = tuple(outputs)
        found = [_LAYER.fullmatch(output) for output in outputs]
        self.layers = sorted(int(match[1]) for match in found if match is not None)

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Normalised images to the wanted ones of `global` [B, D] and maps [B, D, h, w]."""
        found: dict[str, Tensor] = {}
        if self.layers:
            final, maps = self.model.forward_intermediates(x_BCHW, indices=self.layers)
            found = {f"layer{layer}.patch": each for layer, each in zip(self.layers, maps, strict=True)}
        else:
            final = self.model.forward_features(x_BCHW)
        if "patch" in self.outputs:
            found["patch"] = self._as_map(final, (x_BCHW.shape[2], x_BCHW.shape[3]))
        if "global" in self.outputs:
            found["global"] = self.model.forward_head(final, pre_logits=True)
        return found

    def _as_map(self, final: Tensor, image: TokenGrid) -> Tensor:
        if final.ndim == 4:
            return final.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else final
        stated = getattr(self.model, "num_prefix_tokens", None)
        for prefix in range(_MOST_PREFIX_TOKENS) if stated is None else (stated,):
            count = final.shape[1] - prefix
            height = max(1, round((max(count, 0) * image[0] / image[1]) ** 0.5))
            width = count // height
            if count > 1 and height * width == count and abs(height * image[1] / image[0] - width) < 1:
                map_BDhw: Tensor = final[:, prefix:].transpose(1, 2).unflatten(2, (height, width))
                return map_BDhw
        raise ConfigError(f"outputs: patch: expected a map from the student's model, found {list(final.shape)}")


def from_timm(
    name: str,
    weights: Weights,
    seed: int | None,
    size: TokenGrid | None,
    section: str,
    *,
    classifier: bool,
    args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a timm model and load its weights.

    Args:
        name: timm's name of it.
        weights: a file, tensors by name, `random`, or None for timm's own.
        seed: with it `random` weights are those of an extraction.
        size: the image's (H, W), where it is not to be the model's own.
        section: what messages call the model.
        classifier: whether to keep it, with the classes that the weights have.
        args: arguments of the architecture, as a cache records them.

    Raises:
        ConfigError: timm cannot build it.
        MismatchError: the weights do not fit it.
    """
    create = partial(_create, name, size, section, with_layers(args, nn, timm.layers))
    kept = create if classifier else partial(create, num_classes=0)
    if weights is None:
        return kept(pretrained=True)
    if weights == RANDOM:
        return kept() if seed is None else initialise(kept, f"timm:{name}", seed)
    state: Mapping[str, Tensor] = read_weights(weights, section)
    model, own = kept(), create()
    state = convert(own, state)
    if classifier:
        classes = count_classes(own, state)
        model = own if classes == getattr(own, "num_classes", classes) else create(num_classes=classes)
    else:
        dropped = own.state_dict().keys() - model.state_dict().keys()
        state = {key: value for key, value in state.items() if key not in dropped}
    load_strictly(model, state, weights if isinstance(weights, str) else name, section)
    return model


@tensors_only()
def _create(name: str, size: TokenGrid | None, section: str, args: Mapping[str, Any], **options: Any) -> nn.Module:
    options = {**args, **options}
    try:
        if size is not None:
            try:
                model: nn.Module = timm.create_model(name, img_size=size, **options)
                return model
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
        model = timm.create_model(name, **options)
    except TooLargeError:
        raise
    except Exception as error:
        advice = f"; give {section}.weights: a local file, or random" if options.get("pretrained") else ""
        reason = f"{type(error).__name__}: {error}"[:400]
        raise ConfigError(
            f"{section}.model: expected a model that timm can build, found {name!r} ({reason}){advice}"
        ) from error
    return model
