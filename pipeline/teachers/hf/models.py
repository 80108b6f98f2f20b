"""Teachers from Hugging Face: `hf:<id or folder>`, any vision model, or vision tower, that AutoModel knows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import nn

from kpu.errors import TeacherError
from kpu.torch.weights import RANDOM, initialise, seeded
from pipeline.sections import TeacherConfig
from pipeline.teachers.backbone import Backbone, describe, reason, resolve_layers
from pipeline.teachers.hf.accepts import require_images
from pipeline.teachers.hf.input import hf_input
from pipeline.teachers.hf.maps import count_layers
from pipeline.teachers.hf.outputs import HfFeatures, in_order
from pipeline.teachers.weights import can_reach, load_strictly, read_weights

_POOLER = "pooler."
_NO_TOWER = "Unrecognized configuration class"  # transformers' words
_TOWER = "take its vision tower as docs/teachers.md shows"


def load_hf(name: str, config: TeacherConfig, seed: int) -> Backbone:
    """Build a transformers model, load its safetensors, and say how its outputs are reached.

    `patch` is `last_hidden_state` without the tokens before and after the image's, `layer<i>.patch` the hidden state
    after layer i (negative layers count from the end), `global` is `summary` or `pooler_output`, or the class token,
    or the mean over the map. Of a model with text and vision, the vision tower is taken. A pooler that the weights lack
    is left out.

    Raises:
        TeacherError: transformers is not installed, the model or its weights cannot be had, it takes
            no images, or it has no such layer.
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
        require_images(model, who)
        spec = hf_input(transformers, place, options, getattr(architecture, "image_size", None), config.input, who)
    in_order(model)
    layers = resolve_layers(config, count_layers(architecture), who)
    features = HfFeatures(model, config.outputs, layers, spec.size, who, config.pool)
    return Backbone(
        module=model,
        features=features,
        wanted={output: (output,) for output in (*config.outputs, *(f"layer{i}.patch" for i in layers))},
        input=spec,
        stated=features.stated,
        pooling=lambda: features.pooling,
    )


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
    architecture = getattr(found, "vision_config", found)
    kernel = getattr(architecture, "_attn_implementation", None)
    if isinstance(kernel, str) and "/" in kernel:
        raise TeacherError(
            f"{who}: attn_implementation: expected one of transformers' own, found {kernel!r}, which is code from the "
            "hub; remove it from config.json"
        )
    return architecture


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
        if _NO_TOWER in str(error):
            kind = type(architecture).__name__
            raise TeacherError(
                f"{who}: expected a model that AutoModel can load, found {kind}, which it does not know; {_TOWER}"
            ) from error
        raise TeacherError(f"{who}: transformers cannot load it from safetensors: {reason(error)}") from error
    missing = sorted([*report["missing_keys"], *(str(each) for each in report["mismatched_keys"])])
    if missing and all(key.startswith(_POOLER) for key in missing) and hasattr(model, "pooler"):
        model.pooler = None
    elif missing:
        raise TeacherError(
            f"{who}: weights: {place} lacks, or has in another shape, {', '.join(missing[:5])}; if it is of a larger "
            f"model, {_TOWER}"
        )
    return model.float()  # type: ignore[no-any-return]
