"""What a teacher has to show when it is loaded: repeatable features, and maps whose tokens lie where they should.

What was shown once is remembered by the teacher's fingerprint, in the user's own folder: workers and later runs rely on
it.
"""

import json
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kpu.errors import TeacherError
from pipeline.teachers.locality import CHECK, HALVES, Judgement, judge, judge_halves

_PIXELS_AT_ONCE = 2 * 518 * 518  # so that large inputs need no more memory than a small batch
_DRIFT = 1e-2  # of a standard deviation: what another batch size may change in float32
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Claims:
    """What a teacher says of its maps, by name: the grid (h, w) of each, and which of them its library lays out.

    `own_code` says that the model is the user's, `accepted` that he vouches for its maps.
    """

    maps: Mapping[str, tuple[int, int]]
    stated: Callable[[], Collection[str]]
    own_code: bool
    accepted: bool


def prove(
    who: str,
    forward: Callable[[Tensor], Mapping[str, Tensor]],
    images_BHWC: Tensor,
    first: Mapping[str, Tensor] | None,
    claims: Claims,
) -> tuple[str, ...]:
    """Hold the features of `pictures` against them; names of the maps whose order is taken on somebody's word.

    Only where a picture's halves do not show a map are its quarters run through the model as well. `forward` gives
    the outputs of uint8 images, [B, D], [B, T, D] or [B, D, h, w]; `first` are those of the first two pictures, where
    they are there already.

    Raises:
        TeacherError: an image's features depend on chance or on its batch; a map contradicts the order that it claims,
            or shows none and nobody states one.
    """
    first = _in_parts(forward, images_BHWC[:2]) if first is None else first
    again = _in_parts(forward, images_BHWC[[0, HALVES] if claims.maps else [0]])
    _check_repeatable(who, first, again)
    halves = {name: as_map(torch.cat([first[name], again[name][1:]]), grid) for name, grid in claims.maps.items()}
    left = [name for name, maps in halves.items() if maps[0, 0].numel() > 1 and not judge_halves(maps)]
    if not left:
        return ()
    quarters = _in_parts(forward, images_BHWC[1 + HALVES :])
    maps_BDhw = {name: torch.cat([halves[name][:1], as_map(quarters[name], claims.maps[name])]) for name in left}
    return _judge_maps(who, maps_BDhw, claims)


def as_map(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, T, D] as [B, D, h, w]; a map as it is."""
    return features if features.ndim == 4 else features.transpose(1, 2).unflatten(2, grid)


def _check_repeatable(who: str, features: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> None:
    """Compare the features of one image in two batches."""
    for name, tensor in features.items():
        one, other = tensor[0].double(), again[name][0].double()
        if one.shape != other.shape or not bool(one.isfinite().all()):
            continue  # other messages say so
        if float((one - other).abs().max()) > _DRIFT * max(float(tensor.double().std()), _TINY):
            raise TeacherError(
                f"{who}: output {name!r}: expected the same features for the same image in every batch, found other "
                "ones: the model draws random numbers, or normalises over the batch; turn that off in the model, or "
                "take another"
            )


def _judge_maps(who: str, maps_BDhw: Mapping[str, Tensor], claims: Claims) -> tuple[str, ...]:
    judged = {name: judge(tensor) for name, tensor in maps_BDhw.items()}
    left = {name: found for name, found in judged.items() if found.finding != "proven"}
    if claims.accepted or not left:
        return tuple(left)
    stated = claims.stated() if any(found.finding == "open" for found in left.values()) else ()
    for name, found in left.items():
        if found.finding == "contradicted" or name not in stated:
            grid = " x ".join(map(str, maps_BDhw[name].shape[2:]))
            raise TeacherError(f"{who}: {name}: {_what(found, grid)}; {_remedy(name, found, claims.own_code)}")
    return tuple(left)


def _in_parts(forward: Callable[[Tensor], Mapping[str, Tensor]], images_BHWC: Tensor) -> dict[str, Tensor]:
    """`forward` of a few images at a time, by the number of their pixels."""
    step = max(1, _PIXELS_AT_ONCE // (images_BHWC.shape[1] * images_BHWC.shape[2]))
    parts = [forward(images_BHWC[start : start + step]) for start in range(0, len(images_BHWC), step)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _what(found: Judgement, grid: str) -> str:
    expected = f"expected tokens in the order of the image, row by row on a grid of {grid}"
    if found.finding == "open":
        return (
            f"{expected}, found none that tell the quarters of a picture apart ({found.decided} of {found.tokens} "
            "answer to one more than to the others), so their order cannot be shown"
        )
    return (
        f"{expected}, found another: of {found.decided} tokens that answer to a change of one quarter of a picture, "
        f"{found.right} lie in that quarter"
    )


def _remedy(name: str, found: Judgement, own_code: bool) -> str:
    layer = name.removeprefix("layer").removesuffix(".patch")
    drop = "leave patch out (outputs: [global])" if name == "patch" else f"leave {layer} out of layers"
    if not own_code:
        return drop
    mend = "mend it in the module, which may also give [B, D, H, W]" if found.finding == "contradicted" else ""
    vouch = "where you know that it is right, set unproven: accept" if found.finding == "open" else ""
    return f"{mend or vouch}, or {drop}"


def recall(fingerprint: str, maps: Collection[str]) -> tuple[str, ...] | None:
    """The unproven ones among `maps` of a teacher that was checked before; None if it was not."""
    try:
        found: Any = json.loads(_place(fingerprint).read_bytes())["unproven"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = isinstance(found, list) and all(name in maps for name in found)
    return tuple(found) if known else None


def remember(fingerprint: str, unproven: Collection[str]) -> None:
    """Keep what the check found; where the folder cannot be written to, it is done again next time."""
    place = _place(fingerprint)
    temporary = place.with_name(f"{place.name}.{os.getpid()}")
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"unproven": list(unproven)}))
        temporary.replace(place)


def _place(fingerprint: str) -> Path:
    root = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(root) / "kpu" / f"maps-{CHECK}" / fingerprint
