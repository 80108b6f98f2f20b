"""Teachers from timm: `timm:<model>`, also `timm:hf-hub:<id>` and `timm:local-dir:<folder>`."""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import huggingface_hub
import timm
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from kpu.errors import TeacherError
from kpu.format.timm_args import with_layers
from kpu.torch.timm_weights import convert, count_classes
from kpu.torch.weights import RANDOM, differences, initialise
from kpu.trust.list import tensors_only
from pipeline.sections import TeacherConfig
from pipeline.teachers.backbone import Backbone, describe, input_spec, reason, resolve_layers
from pipeline.teachers.timm.classifiers import linear_head
from pipeline.teachers.timm.outputs import TimmFeatures
from pipeline.teachers.weights import can_reach, load_strictly, read_weights

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_SOURCES = ("hf-hub", "hf_hub", "local-dir")  # before a colon, where timm is to find a model; the second is an old name


def load_timm(name: str, config: TeacherConfig, seed: int) -> Backbone:
    """Build a timm model, load its weights, and say how its outputs are reached.

    `patch` is the final feature map without prefix tokens (after the final norm, where the model has one before
    pooling), `layer<i>.patch` the map after block or stage i as `forward_intermediates` counts them (negative ones
    from the end, recorded under their true number), `global` what the classifier sees.

    Raises:
        TeacherError: the model is unknown, its weights cannot be had or do not fit, or it has no such layer.
    """
    who = describe(name, config)
    model_name = config.model.removeprefix("timm:")
    model: Any
    _require_known(model_name, who)
    args = with_layers(config.model_args, nn, timm.layers)
    if "img_size" in args and config.input is not None and config.input.size is not None:
        raise TeacherError(f"{who}: model_args.img_size: expected it or input.size, found both; remove the first")
    create = partial(_create, model_name, _image_size(config), who, args)
    if config.weights is None:
        _require_obtainable(model_name, who)
        model = create(pretrained=True)
    elif config.weights == RANDOM:
        model = initialise(create, config.model, seed)
    else:
        model = _from_file(create, config.weights, who)
    _require_pooling(model, config, who)
    spec = input_spec(resolve_model_data_config(model), config.input, who)
    layers = _layer_indices(model, config, who)
    features = TimmFeatures(model, config.outputs, layers, who, config.pool)
    head, no_head = linear_head(model.get_classifier())
    return Backbone(
        module=model,
        features=features,
        wanted={output: (output,) for output in (*config.outputs, *(f"layer{i}.patch" for i in layers))},
        input=spec,
        head=head,
        no_head=no_head,
        classify=model,
        stated=features.stated,
        pooling=lambda: features.pooling,
    )


def _require_known(model_name: str, who: str) -> None:
    """Refuse a name that timm does not know, before anything is built or fetched."""
    if ":" in model_name:
        _require_source(model_name, who)
        return
    architecture, _, tag = model_name.partition(".")
    if not timm.is_model(architecture):
        names = [*timm.list_models(), *(timm.list_pretrained() if tag else ())]
        near = difflib.get_close_matches(model_name, names, n=3, cutoff=0.5)
        advice = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise TeacherError(f"{who}: timm {timm.__version__} has no model {architecture!r}; {advice}")
    try:
        timm.get_pretrained_cfg(model_name)
    except RuntimeError:
        near = difflib.get_close_matches(model_name, timm.list_pretrained(f"{architecture}.*"), n=3, cutoff=0)
        advice = f"did you mean {', '.join(near)}?" if near else f"write {architecture}"
        raise TeacherError(f"{who}: timm {timm.__version__} has no weights tagged {tag!r}; {advice}") from None


def _require_source(model_name: str, who: str) -> None:
    """Refuse a name with a colon that does not say where timm finds the model."""
    source, _, place = model_name.partition(":")
    if source.lower() not in _SOURCES or not place:
        raise TeacherError(
            f"{who}: model: expected timm:<model>, as timm:vit_small_patch16_224, timm:<model>.<tag>, "
            f"timm:hf-hub:<owner>/<name> or timm:local-dir:<folder>, found timm:{model_name}, which names no model"
        )


def _require_pooling(model: Any, config: TeacherConfig, who: str) -> None:
    """Refuse `global` of a model that timm gives no pooling, such as one whose hub configuration says so."""
    pooling = getattr(model, "global_pool", None)
    if config.pool == "auto" and "global" in config.outputs and "" in (pooling, getattr(pooling, "pool_type", None)):
        raise TeacherError(
            f"{who}: global: timm pools nothing in this model (global_pool: ''); set pool: cls, mean or "
            "cls+mean, or model_args: {global_pool: token}, or leave global out of outputs"
        )


def _image_size(config: TeacherConfig) -> int | tuple[int, int] | None:
    """The overriding input size, as timm's `img_size` takes it."""
    size = config.input.size if config.input is not None else None
    return size[0] if isinstance(size, tuple) and size[0] == size[1] else size


@tensors_only()
def _create(
    model_name: str, size: int | tuple[int, int] | None, who: str, args: Mapping[str, Any], **options: Any
) -> nn.Module:
    """Build a model, at another image size if it must be told; `args` are the user's, `options` win over them."""
    options = {**args, **options}
    try:
        if size is not None:
            try:
                return timm.create_model(model_name, img_size=size, **options)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
        return timm.create_model(model_name, **options)
    except Exception as error:
        if options.get("pretrained"):
            raise _unobtainable(model_name, reason(error), who) from error
        given = f" with model_args {', '.join(args)}" if args else ""
        raise TeacherError(f"{who}: timm cannot build it{given}: {reason(error)}") from error


def _unobtainable(model_name: str, why: str, who: str) -> TeacherError:
    return TeacherError(
        f"{who}: weights: could not get the pretrained weights of {model_name} ({why}); connect to the hub, give a "
        "local .safetensors or .pth file, or `random`"
    )


def _require_obtainable(model_name: str, who: str) -> None:
    """Refuse at once what a hub out of reach would refuse after a minute of retries."""
    if ":" in model_name:
        return
    pretrained = timm.get_pretrained_cfg(model_name)
    repository, url = (pretrained.hf_hub_id, str(pretrained.url or "")) if pretrained is not None else ("", "")
    if not repository and not url:
        raise _unobtainable(model_name, "timm has none", who)
    if repository:
        url = huggingface_hub.constants.ENDPOINT
        own_file = pretrained.hf_hub_filename if pretrained is not None else None
        files = (own_file,) if own_file else _WEIGHT_FILES
        if any(isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str) for file in files):
            return
    if not can_reach(url):
        raise _unobtainable(model_name, f"{url} cannot be reached", who)


def _from_file(create: Callable[..., nn.Module], path: str, who: str) -> nn.Module:
    """Build a model whose classifier has as many classes as the file, and load it strictly.

    A file in the original publisher's naming, or for another image size, goes through timm's own conversion.
    """
    state: Mapping[str, Tensor] = read_weights(path, who)
    model = create()
    if differences(model, state):
        state = convert(model, state)
        classes = count_classes(model, state)
        if classes != getattr(model, "num_classes", classes):
            model = create(num_classes=classes)
    load_strictly(model, state, who, path)
    return model


def _layer_indices(model: Any, config: TeacherConfig, who: str) -> tuple[int, ...]:
    """`layers` as numbers from 0."""
    if not config.layers:
        return ()
    count = len(getattr(model, "feature_info", ()))
    if not hasattr(model, "forward_intermediates") or not count:
        raise TeacherError(f"{who}: layers: timm gives no intermediate features of this model; leave layers out")
    return resolve_layers(config, count, who)
