"""What an image processor of transformers does to pixels, found by running it on fixed images.

Its fields say what to expect; only what gives its own pixels, to within one grey level of 255, is believed.
Letters: H and W the height and width of what it makes.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kpu.format.teacher import InputSpec
from kpu.pixels.resize import geometry
from pipeline.teachers.hf.layout import EXPRESSIBLE, find_layout, interpolation_of, is_padded
from pipeline.teachers.hf.trials import WHITE, NoPixels, NoSize, Trials, Values, run_on_colour

_COLOURS = ((0, 0, 0), (WHITE, WHITE, WHITE), (WHITE, 128, 0))
_EXACT = 0.02  # levels that such an image may be off
_DIGITS = 6  # of a mean or std that is measured
_USUAL = 224  # pixels
_LONGEST_SIDE = 4096  # pixels that a processor is let scale to


class Doubt(NamedTuple):
    """A step of a processor that an InputSpec cannot follow, and values to give `instead`.

    What the user gives under all of their `keys` decides.
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


_studied: dict[str, Studied] = {}


def study(processor: Any) -> Studied:
    """Run a processor on the fixed images; once in a process for equal ones."""
    key = f"{type(processor)} {json.dumps(vars(processor), sort_keys=True, default=str)}"
    if key not in _studied:
        _studied[key] = _study(processor)
    return _studied[key]


def _study(processor: Any) -> Studied:
    name, fields = type(processor).__name__.removesuffix("Pil"), _plain_fields(vars(processor))
    stated, unproven = _stated(fields), suggest(vars(processor))
    own: dict[str, Any] = {}
    try:
        _check_sides(fields)
        own = _measured([run_on_colour(processor, colour) for colour in _COLOURS], stated)
        if (filter_name := interpolation_of(fields)) in EXPRESSIBLE:
            own["interpolation"] = filter_name
        trials = Trials(processor, own)
        fill = _colour_of_mean(own) if is_padded(trials.first) else None
        layout, nearest = find_layout(fields, trials.size, fill, trials)
    except NoPixels as error:
        instead = {key: value for key, value in unproven.items() if key not in own}
        return Studied(own, Doubt("output", f"{name} {error}", instead))
    except NoSize as error:
        return Studied(own, Doubt("size", f"{name} {error}", {"size": unproven["size"]}))
    if layout is None:
        step = "resizing" if fill is None else "padding"
        height, width = trials.size
        found = f"{name} makes images of {height} x {width} pixels by a {step} that cannot be followed; {nearest}"
        return Studied(own, Doubt(step, found, {"size": _plain(trials.size)}))
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
            raise NoPixels(f"has {key} {stated}; expected sides of at most {_LONGEST_SIDE} pixels")


def _stated(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The mean and std that the fields say; where they say none, those that change nothing."""
    factor = WHITE * (fields.get("rescale_factor", 1 / WHITE) if fields.get("do_rescale", True) else 1)
    mean, std = fields.get("image_mean"), fields.get("image_std")
    if not fields.get("do_normalize", True) or mean is None or std is None:
        return {"mean": (0.0,) * 3, "std": (1 / factor,) * 3}
    return {"mean": tuple(value / factor for value in mean), "std": tuple(value / factor for value in std)}


def _measured(flat: Sequence[Values], stated: Mapping[str, Any]) -> dict[str, Any]:
    """The mean, std and order of channels that black, white and a colour come out with, each float [3].

    The stated mean and std are kept where they are right: what is measured is rounded.

    Raises:
        NoPixels: no mean and std do that.
    """
    black, white, colour = flat
    with np.errstate(all="ignore"):
        std = 1 / (white - black)
        mean = -black * std
        shown = (colour * std + mean) * WHITE
    order = next((o for o in ("rgb", "bgr") if _near(shown, _COLOURS[2][:: 1 if o == "rgb" else -1])), None)
    if order is None or not (std > 0).all():
        raise NoPixels(
            f"gives {_list(black)} for black, {_list(white)} for white and {_list(colour)} for orange; expected "
            "(x / 255 - mean) / std of red, green and blue, or of blue, green and red"
        )
    own = dict(stated)
    if not _near((black * stated["std"] + stated["mean"]) * WHITE, 0) or not _near(
        (white * stated["std"] + stated["mean"]) * WHITE, WHITE
    ):
        own = {"mean": _rounded(mean), "std": _rounded(std)}
    return own | ({"channels": "bgr"} if order == "bgr" else {})


def _rounded(values: npt.NDArray[np.floating[Any]]) -> tuple[float, ...]:
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values)


def _near(found: Any, expected: Any) -> bool:
    return bool((np.abs(np.subtract(found, expected)) <= _EXACT).all())


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
