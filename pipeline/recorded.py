"""What a cache records of how it was made, as the configuration that would make it again. Loads no torch."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from kpu.errors import ConfigError, KpuError
from kpu.format.plan import Plan, SourceSpec
from kpu.format.teacher import TeacherSpec
from kpu.records.plan import load_plan
from kpu.records.runs import latest_run
from kpu.records.teachers import read_teacher, teacher_names
from kpu.records.units import count_rows, units_left
from kpu.sources import open_source
from kpu.sources.files import is_local
from kpu.storage import paths
from kpu.storage.open import location_exists, open_storage
from kpu.storage.places import is_plain, require_plain
from pipeline.config import ExtractConfig
from pipeline.paths import absolute
from pipeline.sections import DataConfig, InputConfig, TeacherConfig


def teacher_config(spec: TeacherSpec) -> TeacherConfig:
    """The configuration that loads the teacher of `spec` again."""
    names = [output.name for output in spec.outputs]
    return TeacherConfig(
        model=spec.model,
        weights=spec.weights,
        outputs=tuple(name for name in ("global", "patch") if name in names),
        layers=tuple(_layers(spec)),
        pool=spec.pool or "auto",
        unproven="accept",  # what is stored is compared, not judged again
        labels=spec.labels,
        model_args=spec.model_args,
        input=InputConfig(**{key: getattr(spec.known_input, key) for key in InputConfig.model_fields}),
        precision=spec.precision,
        codec=spec.codec,
    )


def _layers(spec: TeacherSpec) -> Iterator[int | str]:
    """What `layers` said: a number for timm and Hugging Face models, the layer's name for one's own."""
    for output in spec.outputs:
        if output.name not in ("global", "patch"):
            layer = output.name.removesuffix(".patch")
            yield layer if spec.model.startswith("torch:") else int(layer.removeprefix("layer"))


def data_of(out: str) -> dict[str, Any] | None:
    """The section `data` of the cache at `out`, so that a teacher is added without naming it; None if there is none.

    Raises:
        KpuError: there is a cache that cannot be read.
    """
    place = absolute(out)
    if not location_exists(place):
        return None
    storage = open_storage(place)
    plan = load_plan(storage)
    if plan is None:
        return None
    run = latest_run(storage)
    recorded = run.config.get("data") if run is not None else None
    found = planned_data(plan.source, plan.samples, recorded if isinstance(recorded, dict) else {})
    return found.model_dump(exclude_none=True)


def unfinished(config: ExtractConfig, plan: Plan | None) -> ExtractConfig:
    """The configuration without teachers that need not be loaded, unless none would be left.

    These are the ones that the cache has in full and records with the very settings that are asked for.
    """
    if plan is None:
        return config
    storage = open_storage(config.out)
    published = set(teacher_names(storage)) & config.teachers.keys()
    left = units_left(storage, plan, sorted(published))
    done = {
        name
        for name in published
        if not count_rows(plan, left[name]) and _asks_for(config, name, read_teacher(storage, name).spec)
    }
    teachers = {name: teacher for name, teacher in config.teachers.items() if name not in done}
    return config.model_copy(update={"teachers": teachers}) if teachers else config


def _asks_for(config: ExtractConfig, name: str, spec: TeacherSpec) -> bool:
    """Whether the configuration of a teacher says what was recorded; what cannot be told apart here is a no."""
    if spec.input is None or spec.codec != config.codec_of(name) or spec.format != config.format:
        return False
    asked, recorded = config.teachers[name], teacher_config(spec)
    inputs = {} if asked.input is None else asked.input.model_dump(exclude_none=True)
    if isinstance(inputs.get("size"), int):
        inputs["size"] = (inputs["size"], inputs["size"])
    if any(getattr(recorded.input, key) != value for key, value in inputs.items()):
        return False
    apart = {"input", "codec", "compile", "unproven"} | ({"precision"} if asked.precision == "auto" else set())
    keys = TeacherConfig.model_fields.keys() - apart
    return all(getattr(asked, key) == getattr(recorded, key) for key in keys)


def planned_data(planned: SourceSpec, samples: int, recorded: Mapping[str, Any]) -> DataConfig:
    """The source of a cache as a configuration names it.

    A record of a run is not sealed, so what it says counts only where it lists what was planned; it may then say how
    images were chosen, or where local ones moved to.

    Args:
        planned: the plan's source.
        samples: how many the plan has.
        recorded: the section `data` of a run's configuration.

    Raises:
        ConfigError: the plan names a place that is opened only where the user names it.
    """
    there = is_local(planned.root) and os.path.lexists(planned.root)
    if not there and any(character in planned.root for character in "*?[{"):
        raise ConfigError(
            f"{paths.PLAN}: names {planned.root!r} as the source, which does not exist, and could be a pattern; name "
            "the images in a configuration given with -c, as data.source"
        )
    require_plain(planned.root, said_by=paths.PLAN, advice="in a configuration given with -c, as data.source")
    options = {name: value for name, value in planned.options.items() if value is not None}
    own = DataConfig.model_validate({"source": planned.root, "limit": samples, **options})
    try:
        named = DataConfig.model_validate(recorded)
    except ValidationError:
        return own
    patterns = [named.source] if isinstance(named.source, str) else list(named.source)
    inside = all(f"{pattern}/".startswith(f"{planned.root.rstrip('/')}/") for pattern in patterns)
    moved = all(map(is_local, (planned.root, *patterns))) and _is_gone(own)
    if not all(map(is_plain, patterns)) or not (inside or moved):
        return own
    try:
        found = open_source(named).spec
    except KpuError:
        return own
    # How images are decoded is not compared: the plan says so wherever a configuration does not.
    same = (found.kind, found.options) == (planned.kind, planned.options) and (moved or found.root == planned.root)
    return named if same else own


def _is_gone(data: DataConfig) -> bool:
    try:
        open_source(data)
    except KpuError:
        return True
    return False
