"""How an image processor of transformers resizes and cuts: the geometry that gives its own pixels.

Letters: H and W the height and width of what it makes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from PIL import Image

from kpu.pixels.resize import Geometry, resize_image
from pipeline.teachers.hf.trials import Levels

EXPRESSIBLE: Final = ("bilinear", "bicubic", "lanczos", "nearest")
_APART = 1.001  # levels; float32 rounds
_LEVIT = 256 / 224  # LeViT's resize, in no field


class Layout(NamedTuple):
    """A geometry, and the values of an InputSpec that say it."""

    geometry: Geometry
    crop: float
    crop_mode: Literal["center", "squash", "pad"]

    @property
    def own(self) -> dict[str, Any]:
        """By timm's keys, with `crop_rounding` of our own."""
        found = {
            "input_size": self.geometry.size,
            "crop_pct": self.crop,
            "crop_mode": self.crop_mode,
            "crop_rounding": "floor" if self.geometry.floor else "round",
        }
        filter_name = self.geometry.interpolation
        return found | ({"interpolation": filter_name} if filter_name in EXPRESSIBLE else {})

    def __str__(self) -> str:
        how = {"center": "to cover", "squash": "to", "pad": "to fit into"}[self.crop_mode]
        height, width = self.geometry.cover
        return f"{self.geometry.interpolation} scaling {how} {height} x {width} pixels"


def find_layout(
    fields: Mapping[str, Any],
    size: tuple[int, int],
    fill: tuple[int, int, int] | None,
    trials: Iterable[tuple[Image.Image, Levels]],
) -> tuple[Layout | None, str]:
    """The layout that gives what a processor with these fields made, None if none does.

    What the fields say is tried first, then what some processors do without saying it. The text says which came
    nearest, and how near.

    Args:
        fields: the processor's settings.
        size: (H, W) of what it makes.
        fill: the colour with which it fills images up, if it seems to do so.
        trials: images, and what it made of each; gone through again for each layout.
    """
    nearest: tuple[float, Layout] | None = None
    for layout in _layouts(fields, size, fill):
        apart = 0.0
        for picture, theirs in trials:
            apart = max(apart, float(np.abs(resize_image(picture, layout.geometry) - theirs).max()))
            if not apart <= _APART:
                break
        else:
            return layout, ""
        if nearest is None or apart < nearest[0]:
            nearest = (apart, layout)
    assert nearest is not None
    return None, f"the nearest here, {nearest[1]}, is {nearest[0]:.0f} or more of 255 levels apart"


def interpolation_of(fields: Mapping[str, Any]) -> str:
    """The name of the filter that a processor's `resample` says."""
    resample = fields.get("resample")
    if resample is None:
        return "bilinear"  # what resizing itself defaults to
    with suppress(ValueError, TypeError):
        return Image.Resampling(int(resample)).name.lower()
    return str(getattr(resample, "value", resample)).lower()


def is_padded(made: Sequence[Levels]) -> bool:
    """Whether images of several proportions end in a border of one colour."""
    edges = [edge for each in made for edge in (each[-1], each[:, -1], each[0], each[:, 0])]
    return any(float(np.ptp(edge, axis=0).max()) < 1 for edge in edges)


def _layouts(fields: Mapping[str, Any], size: tuple[int, int], fill: tuple[int, int, int] | None) -> Iterator[Layout]:
    """Layouts that give images of `size` (H, W), the likeliest first."""
    stated = interpolation_of(fields)
    filters = [each for each in dict.fromkeys((stated, *EXPRESSIBLE)) if each.upper() in Image.Resampling.__members__]
    if fill is not None:
        yield from (Layout(Geometry(size, size, each, fill=fill), 1.0, "pad") for each in filters)
        return
    covers = [(*each, _crop(size, each[0], fields.get("crop_pct"))) for each in _covers(fields, size)]
    for floor, names in ((True, filters[:1]), (False, filters[:1]), (True, filters[1:])):
        for interpolation in names:
            for cover, squash, crop in covers:
                if crop is not None:
                    geometry = Geometry(size, cover, interpolation, squash, floor)
                    yield Layout(geometry, crop, "squash" if squash else "center")


def _covers(fields: Mapping[str, Any], size: tuple[int, int]) -> Iterator[tuple[tuple[int, int], bool]]:
    """What images may be scaled to (H, W), and whether to exactly that; each once, the likeliest first."""
    stated, fraction = fields.get("size"), fields.get("crop_pct")
    stated = stated if isinstance(stated, Mapping) else {}
    found: list[tuple[tuple[int, int], bool]] = []
    if stated.get("height") and stated.get("width"):
        found.append(((stated["height"], stated["width"]), True))
    edge = stated.get("shortest_edge") or stated.get("height") or min(size)
    edges = [int(edge / fraction)] if fraction else []
    found += [((each, each), squash) for squash in (False, True) for each in (*edges, edge, int(_LEVIT * edge))]
    yield from dict.fromkeys((*found, (size, True), (size, False)))


def _crop(size: tuple[int, int], cover: tuple[int, int], stated: float | None) -> float | None:
    """The fraction for which floor(size / fraction) is `cover`, the processor's own if that is it; None if none is."""
    exact = min(size) / min(cover)
    while math.floor(min(size) / exact) < min(cover):  # despite rounding
        exact = math.nextafter(exact, 0)
    for fraction in (stated, exact):
        if (
            fraction
            and 0 < fraction <= 1
            and all(math.floor(side / fraction) == whole for side, whole in zip(size, cover, strict=True))
        ):
            return fraction
    return None
