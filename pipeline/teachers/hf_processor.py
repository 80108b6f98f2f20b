"""What an image processor of transformers does to pixels, found by running it on fixed images.

Its fields say what to expect; only what gives its own pixels, to within one grey level of 255, is believed.
Letters: H and W the height and width of what it makes.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from cache.pixels.resize import geometry
from cache.spec import InputSpec
from pipeline.teachers.backbone import reason
from pipeline.teachers.hf_layout import EXPRESSIBLE, Levels, find_layout, interpolation_of, is_padded

Values = npt.NDArray[np.float32]
SIZES: Final = ((312, 211), (196, 331), (473, 330), (81, 391), (53, 42), (137, 109))
"""Width and height of the fixed images, chosen so that with the usual crops the two ways of rounding differ."""

_WHITE = 255
_COLOURS = ((0, 0, 0), (_WHITE, _WHITE, _WHITE), (_WHITE, 128, 0))
_FLAT = 64  # pixels, the side of an image of one colour
_EXACT = 0.02  # levels that such an image may be off
_DIGITS = 6  # of a mean or std that is measured
_USUAL = 224  # pixels
_LONGEST_SIDE = 4096  # pixels that a processor is let scale to


class Doubt(NamedTuple):
    """A step of a processor that an InputSpec cannot follow, and values to give `instead`.

    What the user gives under all of their `keys` settles it.
    """

    step: str
    found: str
    instead: Mapping[str, Any]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.instead)


class Studied(NamedTuple):
    """What is known of a processor: `own`, by timm's keys, was shown to be so; `doubt` is the step that was not."""

    own: Mapping[str, Any]
    doubt: Doubt | None = None


class _NoPixels(Exception):
    """A processor gives no [3, H, W]; the message goes on after its name."""


_studied: dict[str, Studied] = {}


def study(processor: Any) -> Studied:
    """Run a processor on the fixed images; once in a process for equal ones."""
    key = f"{type(processor)} {json.dumps(vars(processor), sort_keys=True, default=str)}"
    if key not in _studied:
        _studied[key] = _study(processor)
    return _studied[key]


@lru_cache(maxsize=1)
def pictures() -> tuple[Image.Image, ...]:
    """The fixed images: waves, edges, fine lines and flat parts, different in each channel."""
    found = []
    for width, height in SIZES:
        y, x = np.mgrid[:height, :width].astype(np.float64)
        red = 127.5 + 100 * np.sin(x / 17 + y / 41) * np.cos(y / 23)
        green = np.where((x // 19 + y // 13) % 3 == 1, 230, 40 + x * 120 / width)
        disc = np.hypot(x - width / 2, y - height / 2) < min(width, height) / 3
        blue = np.where(disc, 250, 15 + y % 4 * 9)
        pixels = np.stack([red, green, blue], -1)
        pixels[(x + 2 * y) % 53 < 2] = 0
        found.append(Image.fromarray(pixels.astype(np.uint8)))
    return tuple(found)


def _study(processor: Any) -> Studied:
    name, fields = type(processor).__name__.removesuffix("Pil"), _plain_fields(vars(processor))
    stated, unproven = _stated(fields), suggest(vars(processor))
    own: dict[str, Any] = {}
    try:
        _check_sides(fields)
        own = _measured([_run_on_colour(processor, colour) for colour in _COLOURS], stated)
        if (filter_name := interpolation_of(fields)) in EXPRESSIBLE:
            own["interpolation"] = filter_name
        made = [_run(processor, picture) for picture in pictures()]
    except _NoPixels as error:
        instead = {key: value for key, value in unproven.items() if key not in own}
        return Studied(own, Doubt("output", f"{name} {error}", instead))
    sizes = [f"{each.shape[1]} x {each.shape[2]}" for each in made]
    if len(set(sizes)) > 1:
        i = next(i for i, size in enumerate(sizes) if size != sizes[0])
        one, other = (f"{sizes[at]} pixels of an image of {SIZES[at][1]} x {SIZES[at][0]}" for at in (0, i))
        found = f"{name} makes {one}, and {other}; expected one size"
        return Studied(own, Doubt("size", found, {"size": unproven["size"]}))
    levels = [_levels(each, own) for each in made]
    fill = _colour_of_mean(own) if is_padded(levels) else None
    layout, nearest = find_layout(fields, fill, pictures(), levels)
    if layout is None:
        step = "resizing" if fill is None else "padding"
        found = f"{name} makes images of {sizes[0]} pixels by a {step} that cannot be followed; {nearest}"
        return Studied(own, Doubt(step, found, {"size": _plain(made[0].shape[1:])}))
    own |= layout.own
    if (used := layout.geometry.interpolation) not in EXPRESSIBLE:
        found = f"{name} resizes by {used}; expected one of {', '.join(EXPRESSIBLE)}"
        return Studied(own, Doubt("interpolation", found, {"interpolation": "bilinear"}))
    return Studied(own)


def suggest(values: Mapping[str, Any]) -> dict[str, Any]:
    """A size, mean and std to give instead of a processor that was written with these settings."""
    fields = _plain_fields(values)
    return {"size": _suggested_size(fields), **_stated(fields)}


def _plain_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """A processor's settings, or those that it was written with; what counts of them as plain values, or left out."""
    if isinstance(timms := values.get("data_config"), Mapping):  # of a timm model in transformers
        values = {
            "size": {"shortest_edge": next(reversed(timms.get("input_size") or (0,)))},
            "crop_pct": timms.get("crop_pct"),
            "resample": timms.get("interpolation"),
            "image_mean": timms.get("mean"),
            "image_std": timms.get("std"),
        }
    found = {key: value for key, value in values.items() if not key.startswith("_") and key not in _PLAIN}
    for key, plain in _PLAIN.items():
        if (value := plain(values.get(key))) is not None:
            found[key] = value
    return found


def _positive(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and 0 < value < math.inf else None


def _triple(value: Any) -> tuple[float, float, float] | None:
    """Three numbers, or one for all three."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * 3
    return values if len(values) == 3 and all(isinstance(each, int | float) for each in values) else None


def _sides(value: Any) -> dict[str, int] | None:
    """A size by the names of its sides."""
    if isinstance(value, int):
        value = {"height": value, "width": value}
    with suppress(TypeError, ValueError):
        return {name: side for name, side in dict(value).items() if isinstance(side, int) and _positive(side)}
    return None


_PLAIN: Final[Mapping[str, Callable[[Any], Any]]] = {
    "size": _sides,
    "crop_size": _sides,
    "pad_size": _sides,
    "crop_pct": _positive,
    "rescale_factor": _positive,
    "image_mean": _triple,
    "image_std": _triple,
}


def _check_sides(fields: Mapping[str, Any]) -> None:
    """Refuse what would take gigabytes merely to try."""
    for key in ("size", "crop_size", "pad_size"):
        stated = fields.get(key, {})
        only_bound = "longest_edge" if "shortest_edge" in stated else ""
        sides = [side for name, side in stated.items() if "_pixels" not in name and name != only_bound]
        if max(sides, default=0) / fields.get("crop_pct", 1) > _LONGEST_SIDE:
            raise _NoPixels(f"has {key} {stated}; expected at most {_LONGEST_SIDE} pixels")


def _run(processor: Any, image: Image.Image, *, tiles: bool = False) -> Values:
    """What the model would be given for one image, [3, H, W]; with `tiles` the first of several."""
    try:
        with np.errstate(all="ignore"):
            batch = dict(processor(images=image, return_tensors="pt"))
        found = batch.get("pixel_values")
        values = np.asarray(found[0] if isinstance(found, list | tuple) else found, np.float32)
    except Exception as error:  # of code that is not ours
        raise _NoPixels(f"fails on an image of {image.height} x {image.width}: {reason(error)}") from error
    if found is None:
        raise _NoPixels(f"gives {', '.join(map(str, batch)) or 'nothing'}, expected pixel_values")
    shape = list(values.shape)
    while values.ndim > 3 and (len(values) == 1 or (tiles and len(values))):
        values = values[0]
    if values.ndim != 3 or len(values) != 3 or not values.size:
        other = "" if len(shape) > 3 else "; a model that takes no such images cannot be an hf: teacher"
        raise _NoPixels(f"gives pixel_values {shape}, expected one image [3, H, W]{other}")
    return values


def _run_on_colour(processor: Any, colour: tuple[int, int, int]) -> Values:
    """What an image of one colour becomes, [3]."""
    values = _run(processor, Image.new("RGB", (_FLAT, _FLAT), colour), tiles=True)
    return values[:, values.shape[1] // 2, values.shape[2] // 2].copy()


def _stated(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The mean and std that the fields say; where they say none, those that change nothing."""
    factor = _WHITE * (fields.get("rescale_factor", 1 / _WHITE) if fields.get("do_rescale", True) else 1)
    mean, std = fields.get("image_mean"), fields.get("image_std")
    if not fields.get("do_normalize", True) or mean is None or std is None:
        return {"mean": (0.0,) * 3, "std": (1 / factor,) * 3}
    return {"mean": tuple(value / factor for value in mean), "std": tuple(value / factor for value in std)}


def _measured(flat: Sequence[Values], stated: Mapping[str, Any]) -> dict[str, Any]:
    """The mean, std and order of channels that black, white and a colour come out with, each float [3].

    The stated mean and std are kept where they are right: what is measured is rounded.

    Raises:
        _NoPixels: no mean and std do that.
    """
    black, white, colour = flat
    with np.errstate(all="ignore"):
        std = 1 / (white - black)
        mean = -black * std
        shown = (colour * std + mean) * _WHITE
    order = next((o for o in ("rgb", "bgr") if _near(shown, _COLOURS[2][:: 1 if o == "rgb" else -1])), None)
    if order is None or not (std > 0).all():
        raise _NoPixels(
            f"gives {_list(black)} for black, {_list(white)} for white and {_list(colour)} for orange; expected "
            "(x / 255 - mean) / std of red, green and blue, or of blue, green and red"
        )
    own = dict(stated)
    if not _near((black * stated["std"] + stated["mean"]) * _WHITE, 0) or not _near(
        (white * stated["std"] + stated["mean"]) * _WHITE, _WHITE
    ):
        own = {"mean": _rounded(mean), "std": _rounded(std)}
    return own | ({"channels": "bgr"} if order == "bgr" else {})


def _rounded(values: npt.NDArray[np.floating[Any]]) -> tuple[float, ...]:
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values)


def _near(found: Any, expected: Any) -> bool:
    return bool((np.abs(np.subtract(found, expected)) <= _EXACT).all())


def _levels(values: Values, own: Mapping[str, Any]) -> Levels:
    """Normalised values [3, H, W] back as the grey levels of red, green and blue."""
    std, mean = (np.array(own[key], np.float32) for key in ("std", "mean"))
    levels = (values.transpose(1, 2, 0) * std + mean) * _WHITE
    return levels[..., ::-1] if own.get("channels") == "bgr" else levels


def _colour_of_mean(own: Mapping[str, Any]) -> tuple[int, int, int]:
    """The red, green and blue that an input with this mean is filled up with."""
    spec = InputSpec.model_validate(
        {"size": (1, 1), "crop_mode": "pad", **{key: own[key] for key in ("mean", "std", "channels") if key in own}}
    )
    fill = geometry(spec).fill
    assert fill is not None
    return fill


def _suggested_size(fields: Mapping[str, Any]) -> int | list[int]:
    """A size for a user to give where the processor's own cannot be followed."""
    stated = fields.get("size")
    stated = stated if isinstance(stated, Mapping) else {}
    if stated.get("height") and stated.get("width"):
        return _plain((stated["height"], stated["width"]))
    edge: int = stated.get("shortest_edge") or stated.get("longest_edge") or _USUAL
    return edge if edge <= _LONGEST_SIDE // 2 else _USUAL  # some mean a number of pixels


def _plain(size: Sequence[int]) -> int | list[int]:
    return int(size[0]) if size[0] == size[1] else [int(size[0]), int(size[1])]


def _list(values: Values) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"
