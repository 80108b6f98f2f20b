"""Teachers from Hugging Face: `hf:<id or folder>`, any vision model, or vision tower, that AutoModel knows.

Letters: B images, N tokens with prefix, T tokens without, D channels, H and W the image, h and w the grid.
"""

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import Tensor, nn

from cache.errors import TeacherError
from pipeline.config import TeacherConfig
from pipeline.teachers.backbone import Backbone, describe, map_of_tokens, reason, resolve_layers
from pipeline.teachers.hf_input import hf_input
from pipeline.teachers.weights import RANDOM, can_reach, initialise, load_strictly, read_weights, seeded

_MOST_PREFIX_TOKENS = 16
_POOLER = "pooler."


def load_hf(name: str, config: TeacherConfig, seed: int) -> Backbone:
    """Build a transformers model, load its safetensors, and say how its outputs are reached.

    `patch` is `last_hidden_state` without prefix tokens, `layer<i>.patch` is `hidden_states[i + 1]` (negative layers
    count from the end), `global` is `pooler_output`, or the first token, or the mean over the map. Of a model with
    text and vision, the vision tower is taken. A pooler that the weights lack is left out.

    Raises:
        TeacherError: transformers is not installed, the model or its weights cannot be had, or it has no such layer.
    """
    who = describe(name, config)
    place = config.model.removeprefix("hf:")
    transformers = _import(who)
    options: dict[str, Any] = {"trust_remote_code": False}
    if not Path(place).is_dir():
        options["local_files_only"] = not can_reach(huggingface_hub.constants.ENDPOINT)
    with _quiet(transformers):
        architecture = _architecture(transformers, place, options, who)
        model = _model(transformers, architecture, place, options, config, seed, who)
        spec = hf_input(transformers, place, options, getattr(architecture, "image_size", None), config.input, who)
    count = len(getattr(architecture, "depths", ())) or getattr(architecture, "num_hidden_layers", 0)
    layers = resolve_layers(config, count, who)
    return Backbone(
        module=model,
        features=HfFeatures(model, config.outputs, layers, spec.size, who),
        wanted={output: (output,) for output in (*config.outputs, *(f"layer{i}.patch" for i in layers))},
        input=spec,
    )


class HfFeatures(nn.Module):
    """All wanted outputs of a transformers model in one forward pass."""

    def __init__(
        self, model: Any, outputs: Collection[str], layers: tuple[int, ...], size: tuple[int, int], who: str
    ) -> None:
        super().__init__()
        self.model = model
        self._with_global, self._with_patch = "global" in outputs, "patch" in outputs
        self._layers, self._who = layers, who
        self._options: dict[str, Any] = {"output_hidden_states": True} if layers else {}
        own = getattr(model.config, "image_size", None)
        resized = own is not None and _pair(own) != size
        if resized and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            self._options["interpolate_pos_encoding"] = True

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        found = self.model(pixel_values=x_BCHW, **self._options)
        result: dict[str, Tensor] = {}
        if self._with_global:
            result["global"] = self._pool(found, x_BCHW)
        if self._with_patch:
            result["patch"] = self._as_map(found.last_hidden_state, x_BCHW)
        for layer in self._layers:
            result[f"layer{layer}.patch"] = self._as_map(found.hidden_states[layer + 1], x_BCHW)
        return result

    def _pool(self, found: Any, x_BCHW: Tensor) -> Tensor:
        pooled = getattr(found, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)  # type: ignore[no-any-return]
        tokens = found.last_hidden_state
        if tokens.ndim == 3 and self._prefix(tokens, x_BCHW):
            return tokens[:, 0]  # type: ignore[no-any-return]
        return self._as_map(tokens, x_BCHW).mean((2, 3))

    def _prefix(self, tokens_BND: Tensor, x_BCHW: Tensor) -> int:
        """Tokens before those of the image: what the grid of patches leaves over. 0 for models that merge patches."""
        patch = getattr(self.model.config, "patch_size", None)
        if patch is None:
            return 0
        height, width = _pair(patch)
        left = tokens_BND.shape[1] - (x_BCHW.shape[2] // height) * (x_BCHW.shape[3] // width)
        return left if 0 <= left <= _MOST_PREFIX_TOKENS else 0

    def _as_map(self, features: Tensor, x_BCHW: Tensor) -> Tensor:
        """[B, D, h, w]."""
        if features.ndim == 4:
            return features
        found = map_of_tokens(features, self._prefix(features, x_BCHW), (x_BCHW.shape[2], x_BCHW.shape[3]))
        if found is None:
            raise TeacherError(
                f"{self._who}: patch: expected tokens that map the image, found {list(features.shape)}; leave patch "
                "and layers out"
            )
        return found


def _import(who: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise TeacherError(
            f"{who}: hf: models need transformers, which is not installed; pip install 'kpu[hf]'"
        ) from None
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and reports of the text tower's unused weights."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _architecture(transformers: Any, place: str, options: Mapping[str, Any], who: str) -> Any:
    """The model's configuration; of a model with text and vision, the vision tower's."""
    try:
        found = transformers.AutoConfig.from_pretrained(place, **options)
    except Exception as error:
        raise TeacherError(
            f"{who}: expected a Hugging Face model id or a folder written by save_pretrained: {reason(error)}"
        ) from error
    return getattr(found, "vision_config", found)


def _model(
    transformers: Any,
    architecture: Any,
    place: str,
    options: Mapping[str, Any],
    config: TeacherConfig,
    seed: int,
    who: str,
) -> nn.Module:
    def build() -> nn.Module:
        return transformers.AutoModel.from_config(architecture, trust_remote_code=False).float()  # type: ignore[no-any-return]

    try:
        if config.weights == RANDOM:
            return initialise(build, config.model, seed)
        if config.weights is not None:
            with seeded(seed):
                model = build()
            load_strictly(model, read_weights(config.weights, who), who, config.weights)
            return model
        model, report = transformers.AutoModel.from_pretrained(
            place, config=architecture, use_safetensors=True, output_loading_info=True, **options
        )
    except TeacherError:
        raise
    except Exception as error:
        raise TeacherError(f"{who}: transformers cannot load it from safetensors: {reason(error)}") from error
    missing = sorted([*report["missing_keys"], *(str(each) for each in report["mismatched_keys"])])
    if missing and all(key.startswith(_POOLER) for key in missing) and hasattr(model, "pooler"):
        model.pooler = None
    elif missing:
        raise TeacherError(f"{who}: weights: {place} lacks, or has in another shape, {', '.join(missing[:5])}")
    return model.float()  # type: ignore[no-any-return]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
