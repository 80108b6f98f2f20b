"""The configuration of `kpu-cache extract`: one schema for the file, the flags and the record kept with the cache."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, field_validator, model_validator

from kpu.config.paths import anchor_paths
from kpu.config.settings import (
    COUNT,
    COUNT_OR_AUTO,
    Positive,
    Section,
    as_schema,
    check_command,
    read_yaml,
    section,
    setting,
    split,
    validate,
    validate_overridden,
)
from kpu.errors import ConfigError
from kpu.format.plan import CropSpec
from kpu.format.teacher import CodecSpec, ShardFormat
from kpu.storage import paths
from kpu.storage.places import refuse_password
from pipeline.sections import (
    Auto,
    DataConfig,
    ExecutorConfig,
    TeacherConfig,
    Text,
)

_PATHS: Final = ("data.source", "out", "calibration_from", "teachers.*.model", "teachers.*.weights")
_HOW: Final = {
    "data": "DATA or data.source",
    "data.source": "DATA or data.source",
    "out": "-o or out",
    "teachers": "-t NAME=MODEL or teachers",
}


class ExtractConfig(Section):
    """Everything `kpu-cache extract` needs to know."""

    data: DataConfig
    """Where the images are."""
    views: Positive = setting(COUNT, default=1)
    """Rows for each image. More than 1: random crops, the same for every teacher."""
    crop: CropSpec = CropSpec()
    """How views are cropped."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = setting("a whole number from 0 to 2**63 - 1", default=0)
    """Of crops, of the calibration sample and of random weights."""
    out: Text = setting("the path or URL of the cache to make, continue or add to")
    """The cache: a folder on a file system with hard links (NFS included), or an object store."""
    unit_rows: Auto | Annotated[int, Field(ge=64, le=4096)] = setting(
        "a power of two from 64 to 4096, or auto", default="auto"
    )
    """Rows that are computed, written and, after a crash, done again together."""
    codec: CodecSpec = CodecSpec()
    """How features are stored. `uniform` and `rotated` (smaller for ViTs) quantise; `step` is in standard deviations of
    a channel.
    """
    format: ShardFormat = setting("zarr or webdataset", default="zarr")
    """`zarr`, or `webdataset`: tars that its library reads. The stored values are the same."""
    calibration_rows: Positive | Auto = setting(COUNT_OR_AUTO, default="auto")
    """Rows that fix the quantisation grid. Auto is 2,048; for codec `rotated` 10 rows a channel of its widest output,
    if that is more. Training with `normalize: phi-s` needs 10 rows a channel of `global` as well.
    """
    calibration_from: Text | None = setting("the path or URL of another cache, or null", default=None)
    """Another cache whose grid and statistics to use: a test set beside its training set."""
    allow_nonfinite: bool = setting("true or false", default=False)
    """Mask a row for a teacher that gives NaN or infinity; otherwise its unit fails, and is tried again."""
    teachers: Annotated[dict[str, TeacherConfig], Field(min_length=1)] = setting(
        "a mapping of at least one name to a teacher"
    )
    """The teachers by name."""
    executor: ExecutorConfig = ExecutorConfig()
    """Who computes."""

    @field_validator("unit_rows")
    @classmethod
    def _power_of_two(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value & (value - 1):
            raise ValueError(f"expected a power of two from 64 to 4096, found {value}")
        return value

    @field_validator("teachers")
    @classmethod
    def _names(cls, value: dict[str, TeacherConfig]) -> dict[str, TeacherConfig]:
        for name in value:
            try:
                paths.check_name("teacher", name)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _crops_belong_to_views(self) -> "ExtractConfig":
        if self.views == 1 and self.crop != CropSpec():
            raise ValueError("crop: expected views above 1 with it, found views 1, which is the plain full view")
        return self

    @property
    def planned_crop(self) -> CropSpec | None:
        """What the plan says of crops: None for the plain full view."""
        return self.crop if self.views > 1 else None

    def codec_of(self, teacher: str) -> CodecSpec:
        """The codec of one teacher: its own, or the common one."""
        return self.teachers[teacher].codec or self.codec


def load_config(
    path: str | os.PathLike[str] | None = None,
    *,
    data: str | None = None,
    teachers: Sequence[str] = (),
    out: str | None = None,
    overrides: Sequence[str] = (),
    executor: str | None = None,
    ray_address: str | None = None,
    planned: Callable[[str], Mapping[str, Any] | None] = lambda _: None,
) -> ExtractConfig:
    """Read a YAML file, lay the command line's values over it, and validate the whole once.

    Relative paths in the file begin at its folder, those of the command line at the working directory. `teachers` are
    NAME=MODEL, `overrides` KEY.PATH=YAML; overrides win over everything else. Where nothing names a source, `planned`
    gives that of the cache at `out`, if there is one.

    Raises:
        ConfigError: naming the key, what was expected and what was found.
    """
    values: dict[str, Any] = read_yaml(Path(path)) if path is not None else {}
    if path is not None:
        check_command(values, path, "kpu-cache extract")
        anchor_paths(values, Path(path), _PATHS)
    named = [split(assignment, "--teacher", "NAME=MODEL") for assignment in teachers]
    for name, model in named:
        if [other for other, _ in named].count(name) > 1:
            raise ConfigError(f"--teacher {name}={model}: expected each name once, found {name!r} again; rename one")
        section(values, ["teachers", name])["model"] = model
    flags = {"data.source": data, "out": out, "executor.kind": executor, "executor.address": ray_address}
    for key, value in flags.items():
        if value is not None:
            *parents, leaf = key.split(".")
            section(values, parents)[leaf] = value
    _fill_data(values, overrides, planned)
    config = validate_overridden(values, overrides, str(path) if path is not None else None, validate_config)
    _refuse_passwords(config)
    if ray_address is not None and config.executor.kind != "ray":
        raise ConfigError(
            f"--ray-address {ray_address}: expected with executor.kind ray, found {config.executor.kind}; add "
            "--executor ray"
        )
    return config


def _refuse_passwords(config: ExtractConfig) -> None:
    source, lender = config.data.source, config.calibration_from
    places = [("data.source", each) for each in ((source,) if isinstance(source, str) else source)]
    for option, place in [*places, ("out", config.out), *([] if lender is None else [("calibration_from", lender)])]:
        refuse_password(place, option)


def _fill_data(
    values: dict[str, Any], overrides: Sequence[str], planned: Callable[[str], Mapping[str, Any] | None]
) -> None:
    data, out = values.get("data"), values.get("out")
    for assignment in overrides:
        key, _, value = assignment.partition("=")
        if key in ("data", "data.source"):
            return
        out = value if key == "out" else out
    if isinstance(out, str) and (data is None or (isinstance(data, dict) and "source" not in data)):
        found = planned(out)
        if found is not None:
            values["data"] = {**found, **(data or {})}


def as_config(config: ExtractConfig | Mapping[str, Any] | str | os.PathLike[str]) -> ExtractConfig:
    """A configuration as it is, from its plain values, or from the YAML file at a path. Raises as `load_config`."""
    return as_schema(ExtractConfig, config, validate_config, load_config)


def validate_config(values: Mapping[str, Any], where: str) -> ExtractConfig:
    """Validate plain values; `where` names them in messages."""
    return validate(ExtractConfig, values, where, _HOW)
