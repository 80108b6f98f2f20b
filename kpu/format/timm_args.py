"""Arguments of timm's `create_model` that a configuration may give: plain values, and layers by their names."""

from collections.abc import Mapping
from math import isfinite
from types import ModuleType
from typing import Annotated, Any, Final

from pydantic import AfterValidator

LAYERS: Final[Mapping[str, str]] = {
    "GELU": "nn",
    "ReLU": "nn",
    "SiLU": "nn",
    "GELUTanh": "timm",
    "QuickGELU": "timm",
    "LayerNorm": "timm",
    "LayerNorm2d": "timm",
    "RmsNorm": "timm",
    "GatedMlp": "timm",
    "GluMlp": "timm",
    "Mlp": "timm",
    "SwiGLU": "timm",
    "SwiGLUPacked": "timm",
}
"""What an argument that ends in `_layer` may name, and whether torch.nn or timm.layers has it."""

_OF_LAYER: Final = "_layer"
_OTHERWISE: Final = {
    "pretrained": "weights",
    "checkpoint_path": "weights",
    "in_chans": "teachers of three channels, red, green and blue",
}
_REFUSED: Final = frozenset(
    {
        *("cache_dir", "device", "dtype", "exportable", "feature_cfg", "features_only", "kwargs_filter", "model_name"),
        *("no_jit", "out_indices", "output_fmt", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_filter_fn"),
        *("pretrained_strict", "scriptable"),
    }
)


def check_model_args(values: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, unless there is one that none may give; timm says itself which of them a model lacks.

    Raises:
        ValueError: an argument reads other weights, code or features than the rest of the configuration says, is no
            plain value, or names a layer that is not among `LAYERS`.
    """
    for key, value in values.items():
        if key in _REFUSED or (key in _OTHERWISE and (key, value) != ("in_chans", 3)):
            instead = f"; it takes {_OTHERWISE[key]}" if key in _OTHERWISE else ""
            raise ValueError(f"expected arguments of the architecture, found {key}{instead}")
        if key.endswith(_OF_LAYER) and isinstance(value, str) and value not in LAYERS:
            raise ValueError(f"{key}: expected one of {', '.join(LAYERS)}, found {value!r}")
        _require_plain(key, value)
    return values


def _require_plain(key: str, value: Any) -> None:
    if isinstance(value, list | tuple):
        for each in value:
            _require_plain(key, each)
    elif not isinstance(value, str | int | float | bool | None) or (isinstance(value, float) and not isfinite(value)):
        raise ValueError(f"{key}: expected a plain value or a list of them, found {value!r}")


ModelArgs = Annotated[dict[str, Any], AfterValidator(check_model_args)]


def with_layers(values: Mapping[str, Any] | None, nn: ModuleType, timm_layers: ModuleType) -> dict[str, Any]:
    """The arguments as timm takes them: names of layers replaced by the classes of `torch.nn` and `timm.layers`."""
    places = {"nn": nn, "timm": timm_layers}
    return {
        key: getattr(places[LAYERS[value]], value) if key.endswith(_OF_LAYER) and value in LAYERS else value
        for key, value in (values or {}).items()
    }
