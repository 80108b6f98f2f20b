"""What the three kinds of teachers have in common before they are frozen.

Letters: B images, N tokens with prefix, T tokens, D channels, H and W the image, h and w the grid.
"""

import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from kpu.errors import TeacherError
from kpu.format.teacher import InputSpec
from pipeline.sections import InputConfig, TeacherConfig

_RGB = ("red", "green", "blue")
_CUSTOM_CODE = "trust_remote_code"
_TIMM_KEYS = {
    "input_size": "size",
    "mean": "mean",
    "std": "std",
    "interpolation": "interpolation",
    "crop_pct": "crop",
    "crop_mode": "crop_mode",
    "crop_rounding": "crop_rounding",  # this and the next are not timm's
    "channels": "channels",
}


@dataclass
class Backbone:
    """A loaded model, before it is frozen and moved to a device.

    `features` maps normalised float32 [B, 3, H, W] to named tensors: [B, D] for `global`, [B, D, h, w] or, where the
    grid is square, [B, T, D] for maps. `wanted` gives, for each output in stored order, the names that `features` may
    use for it. `head` is the linear classifier on `global`; with `classify`, the model's own way from images to
    logits, it is kept only if the two agree. `extra_digest` is of what computes besides the module's state_dict;
    `compiled` says that a program is among it, whose mode of training cannot be changed. `code` are the places, by
    digest, of the user's own code that was run. `stated` gives, for images, the maps whose order the model's library
    states; `pooling`, once `features` was called, says what `global` is. `no_head` says why a classifier is not a
    `head`.
    """

    module: nn.Module
    features: Callable[[Tensor], Any]
    wanted: dict[str, tuple[str, ...]]
    input: InputSpec
    head: nn.Linear | None = None
    classify: Callable[[Tensor], Any] | None = None
    stated: Callable[[Tensor], Collection[str]] = lambda _: ()
    pooling: Callable[[], str | None] = lambda: None
    source_digest: str | None = None
    extra_digest: str | None = None
    compiled: bool = False
    code: dict[str, str] = field(default_factory=dict)
    no_head: str | None = None


def describe(name: str, config: TeacherConfig) -> str:
    """How messages call a teacher."""
    return f"teacher {name!r} ({config.model})"


def reason(error: BaseException) -> str:
    """An unforeseen error of somebody else's code, as a clause of a message that says where it came from."""
    text = " ".join(str(error).split())[:400]
    if _CUSTOM_CODE in str(error):  # the library advises a key that would run it
        text = (
            "it needs Python code that comes with its weights, which is not run unasked; read that code, and load the "
            "model in a torch: factory of your own that does"
        )
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith("<")]
    known = bool(frames) and not isinstance(error, SyntaxError)  # which names its own place
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if known else ""
    return f"{type(error).__name__}{place}: {text}" if text else f"{type(error).__name__}{place}"


def input_spec(own: Mapping[str, Any], override: InputConfig | None, who: str) -> InputSpec:
    """The model's own preprocessing, in timm's keys {input_size, mean, std, interpolation, crop_pct}, overridden.

    Raises:
        TeacherError: a value is missing or malformed.
    """
    values: dict[str, Any] = {ours: own[theirs] for theirs, ours in _TIMM_KEYS.items() if theirs in own}
    _require_rgb(values, override, who)
    if isinstance(values.get("size"), list | tuple):
        values["size"] = values["size"][-2:]  # timm puts the channels first
    if override is not None:
        values |= override.model_dump(exclude_none=True)
    if isinstance(values.get("size"), int):
        values["size"] = (values["size"], values["size"])
    try:
        spec = InputSpec.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(_said(each) for each in error.errors())
        raise TeacherError(f"{who}: preprocessing: {wrong}; give it under the teacher's `input`") from None
    if min(spec.std) <= 0:
        raise TeacherError(f"{who}: preprocessing: std: expected positive numbers, found {spec.std}")
    return spec


def _said(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors; that of a whole value says by itself what was found."""
    place = ".".join(map(str, error["loc"]))
    return f"{place}: {error['msg']}, found {error['input']!r}" if place else error["msg"].partition(", ")[2]


def _require_rgb(values: Mapping[str, Any], override: InputConfig | None, who: str) -> None:
    """Refuse a model of other than three channels, but for what `input` overrides."""
    given = override.model_dump(exclude_none=True) if override is not None else {}
    counts = {key: len(v) for key in ("mean", "std") if isinstance(v := values.get(key), list | tuple)}
    counts = {key: count for key, count in counts.items() if key not in given}
    size = values.get("size")
    if isinstance(size, list | tuple) and len(size) == 3:
        counts["input_size"] = size[0]
    for key, count in counts.items():
        if count != len(_RGB):
            raise TeacherError(
                f"{who}: preprocessing: expected a teacher of three channels, {', '.join(_RGB)}, found {count} in its "
                f"{key}; images have three here, so wrap it in a torch: factory that makes its channels of them, as "
                "x.mean(1, keepdim=True) for a grey one"
            )


def resolve_layers(config: TeacherConfig, count: int, who: str) -> tuple[int, ...]:
    """`config.layers` of a model with `count` blocks or stages, counted from 0; negative ones from the end.

    Raises:
        TeacherError: one is no number, is out of range, or is given twice; or the model has none.
    """
    found = []
    if config.layers and not count:
        raise TeacherError(f"{who}: layers: expected a model that says how many layers it has; leave layers out")
    for layer in config.layers:
        if not isinstance(layer, int) or not -count <= layer < count:
            raise TeacherError(f"{who}: layers: expected numbers from 0 to {count - 1}, found {layer!r}")
        found.append(layer % count)
    if len(set(found)) != len(found):
        raise TeacherError(f"{who}: layers: expected each once, found {list(config.layers)}")
    return tuple(found)


def map_of_tokens(tokens_BND: Tensor, prefix: int, image: tuple[int, int]) -> Tensor | None:
    """Tokens after `prefix` as a map [B, D, h, w] with the proportions of `image` (H, W); None if they form none."""
    grid = proportional_grid(tokens_BND.shape[1] - prefix, image)
    return None if grid is None else tokens_BND[:, prefix:].transpose(1, 2).unflatten(2, grid)


def proportional_grid(count: int, image: tuple[int, int]) -> tuple[int, int] | None:
    """(h, w) of `count` tokens with the proportions of `image` (H, W); None if they form none."""
    if count < 2:  # one token is a summary
        return None
    height = max(1, round((count * image[0] / image[1]) ** 0.5))
    width = count // height
    return (height, width) if height * width == count and has_proportions((height, width), image) else None


def has_proportions(grid: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether a grid (h, w) has the proportions of `image` (H, W), but for rounding."""
    inside = 0 < grid[0] <= image[0] and 0 < grid[1] <= image[1]
    return inside and abs(grid[0] * image[1] / image[0] - grid[1]) < 1
