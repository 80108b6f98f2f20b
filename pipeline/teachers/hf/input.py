"""Preprocessing of `hf:` teachers: the model's own image processor's, shown to be so, or refused by the step."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from kpu.errors import TeacherError
from kpu.format.teacher import InputSpec
from kpu.pixels.resize import geometry
from pipeline.sections import InputConfig
from pipeline.teachers.backbone import input_spec, reason
from pipeline.teachers.hf.processor import Doubt, Studied, study, suggest

_FILES: Final = ("preprocessor_config.json", "processor_config.json")
_TRIPLE: Final = "[<red>, <green>, <blue>]"


def hf_input(
    transformers: Any,
    place: str,
    options: Mapping[str, Any],
    image_size: Any,
    override: InputConfig | None,
    who: str,
) -> InputSpec:
    """What the image processor of the model in `place` does, changed by the user's `override`.

    The processor is loaded with `options` and run on a few fixed images, unless the user says everything. Code of the
    model's own is never run. `image_size` is what the model's configuration says, for advice alone.

    Raises:
        TeacherError: there is no processor, or a step of it cannot be followed, and the user does not say what to do
            instead.
    """
    given = set(override.model_dump(exclude_none=True)) if override is not None else set()
    complete = given == set(InputConfig.model_fields)
    own, doubt = Studied({}) if complete else _study(transformers, place, options)
    if doubt is not None and not given.issuperset(doubt.keys):
        advised = {**doubt.instead, **({"size": image_size} if image_size and "size" in doubt.instead else {})}
        missing = {key: value for key, value in advised.items() if key not in given}
        raise TeacherError(
            f"{who}: preprocessing: {doubt.step}: {doubt.found}; to choose what the model is given instead, set the "
            f"teacher's `input: {{{_flow(missing)}}}`"
        )
    spec = input_spec({"crop_rounding": "floor", **own}, override, who)
    how = geometry(spec)
    cuts_nothing = how.fill is not None or (how.squash and how.cover == how.size)
    return spec.model_copy(update={"crop_rounding": "round"}) if cuts_nothing and "crop_rounding" not in given else spec


def _study(transformers: Any, place: str, options: Mapping[str, Any]) -> Studied:
    try:
        processor = _load(transformers, place, options)
    except Exception as error:  # of code that is not ours, on files that anyone may have written
        found = f"transformers cannot make the model's: {reason(error)}"
        if Path(place).is_dir() and not any((Path(place) / file).exists() for file in _FILES):
            found = f"expected {_FILES[0]} in the folder, found none"
        return Studied({}, Doubt("image processor", found, _written(transformers, place, options)))
    return study(processor)


def _written(transformers: Any, place: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the files of a processor that is not to be had say of size, mean and std."""
    try:
        values, _ = transformers.ImageProcessingMixin.get_image_processor_dict(
            place, local_files_only=options.get("local_files_only", False)
        )
        return suggest(values) if "image_mean" in values else {**suggest(values), "mean": _TRIPLE, "std": _TRIPLE}
    except Exception:  # as above; whatever it is was said there
        return {"size": "<pixels>", "mean": _TRIPLE, "std": _TRIPLE}


def _load(transformers: Any, place: str, options: Mapping[str, Any]) -> Any:
    """The model's image processor: on Pillow, as pixels are made here, if there is one."""
    backend: dict[str, Any] = {"backend": "pil"}
    if find_spec("transformers.image_processing_backends") is None:  # before transformers 5
        backend = {"use_fast": False}
    return transformers.AutoImageProcessor.from_pretrained(place, **backend, **options)


def _flow(values: Mapping[str, Any]) -> str:
    """Values as YAML on one line."""
    return ", ".join(f"{key}: {list(value) if isinstance(value, tuple) else value}" for key, value in values.items())
