"""Whether a transformers model takes images, told before it is run."""

import inspect
from typing import Any

from kpu.errors import TeacherError

_IMAGES = "pixel_values"
_CLIPS = ("num_frames", "frames_per_clip")  # in a configuration
_ADVICE = "wrap it in a torch: factory that makes this of images (docs/teachers.md, Models that take no plain images)"


def require_images(model: Any, who: str) -> None:
    """Refuse a model that takes clips, or something besides or instead of images [B, 3, H, W].

    Raises:
        TeacherError: naming what it takes.
    """
    frames = next((found for key in _CLIPS if (found := getattr(model.config, key, None)) is not None), None)
    if frames is not None:
        raise _refusal(f"clips of {frames} frames", who)
    parameters = inspect.signature(model.forward).parameters
    needed = [
        name
        for name, each in parameters.items()
        if each.default is each.empty and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    ]
    if needed and set(needed) != {_IMAGES}:
        raise _refusal(", ".join(needed), who)
    if not needed and _IMAGES not in parameters:
        raise _refusal(str(model.main_input_name), who)


def _refusal(taken: str, who: str) -> TeacherError:
    return TeacherError(
        f"{who}: expected a model that takes {_IMAGES} [B, 3, H, W] alone, found one of {taken}; {_ADVICE}"
    )
