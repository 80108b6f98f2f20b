"""The configuration of `kpu-cache extract`: one schema for the file, the flags and the record kept with the cache."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from kpu.config.paths import anchor_paths
from kpu.config.settings import Positive, Section, read_yaml, section, split, validate, validate_overridden
from kpu.errors import ConfigError
from kpu.format.spec import CodecSpec, CropSpec, Pool, ShardFormat
from kpu.format.timm_args import ModelArgs
from kpu.storage import paths
from kpu.storage.places import refuse_password

Text = Annotated[str, Field(min_length=1)]
Auto = Literal["auto"]

# A field's description is what a message says was expected.
_COUNT = "a whole number above 0"
_COUNT_OR_NULL = f"{_COUNT}, or null"
_COUNT_OR_AUTO = f"{_COUNT}, or auto"
_THREE = "three numbers, of red, green and blue, or null"
_MODEL = "timm:<model>, hf:<id or folder> or torch:<module or path/to/file.py>:<factory>"

_PATHS: Final = ("data.source", "out", "calibration_from", "teachers.*.model", "teachers.*.weights")
_HOW: Final = {
    "data": "DATA or data.source",
    "data.source": "DATA or data.source",
    "out": "-o or out",
    "teachers": "-t NAME=MODEL or teachers",
}


class DataConfig(Section):
    """Where the images are. `image`, `label` and `key` name columns or members where the default is not right.

    `label: false` leaves labels out. Images of more than `max_pixels` are masked; `bits` is how many of 16 are used.
    """

    source: Text | tuple[Text, ...] = Field(description="a path, URL or pattern, or a list of them")
    image: Text | None = Field(default=None, description="a name, or null")
    label: Text | Literal[False] | None = Field(default=None, description="a name, false for no labels, or null")
    key: Text | None = Field(default=None, description="a name, or null")
    limit: Positive | None = Field(default=None, description=_COUNT_OR_NULL)
    max_pixels: Positive | None = Field(default=None, description=_COUNT_OR_NULL)
    bits: Annotated[int, Field(ge=8, le=16)] | None = Field(
        default=None, description="a whole number from 8 to 16, or null"
    )


class InputConfig(Section):
    """What to change of a teacher's own preprocessing; `crop` is timm's crop_pct. All that `InputSpec` has."""

    size: Positive | tuple[Positive, Positive] | None = Field(
        default=None, description="a whole number of pixels above 0, [height, width], or null"
    )
    mean: tuple[float, float, float] | None = Field(default=None, description=_THREE)
    std: tuple[float, float, float] | None = Field(default=None, description=_THREE)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = Field(
        default=None, description="nearest, bilinear, bicubic, lanczos or null"
    )
    crop: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="a number above 0, at most 1, or null"
    )
    crop_mode: Literal["center", "squash", "pad"] | None = Field(
        default=None, description="center, squash, pad or null"
    )
    crop_rounding: Literal["round", "floor"] | None = Field(default=None, description="round, floor or null")
    channels: Literal["rgb", "bgr"] | None = Field(default=None, description="rgb, bgr or null")


class TeacherConfig(Section):
    """One frozen teacher. `model` is `timm:<model>`, `hf:<id or folder>` or `torch:<module or file.py>:<factory>`."""

    model: str = Field(description=_MODEL)
    weights: Text | None = Field(
        default=None, description="the path of a weights file, random, or null for the model's own"
    )
    outputs: tuple[Literal["global", "patch"], ...] = Field(
        default=("global", "patch"), description="a list of global and patch, or of one of them"
    )
    layers: tuple[int | str, ...] = Field(default=(), description="a list of numbers or names of layers")
    pool: Pool | Auto = Field(default="auto", description="auto, cls, mean, cls+mean or pooler")
    unproven: Literal["refuse", "accept"] = Field(default="refuse", description="refuse or accept")
    labels: tuple[int | str | None, ...] | None = Field(
        default=None, description="a list of names or numbers of classes and nulls, or null"
    )
    model_args: ModelArgs | None = Field(default=None, description="a mapping of timm's arguments, or null")
    input: InputConfig | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(default="auto", description="auto, fp32, bf16 or fp16")
    compile: bool = Field(default=False, description="true or false")
    codec: CodecSpec | None = None

    @field_validator("model")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        kind, separator, rest = value.partition(":")
        if not separator or not rest or kind not in ("timm", "hf", "torch"):
            raise ValueError(f"expected {_MODEL}, found {value!r}")
        if kind == "torch" and ":" not in rest:
            raise ValueError(f"expected torch:<module or path/to/file.py>:<factory>, found {value!r}")
        return value

    @field_validator("outputs")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"expected each output once, found {list(value)}")
        return value

    @model_validator(mode="after")
    def _arguments_are_timms(self) -> "TeacherConfig":
        if self.model_args is not None and not self.model.startswith("timm:"):
            raise ValueError(f"model_args: expected a timm: model with them, found {self.model}; remove them")
        return self

    @model_validator(mode="after")
    def _emits_something(self) -> "TeacherConfig":
        if not self.outputs and not self.layers:
            raise ValueError("expected at least one of outputs and layers, found neither")
        if self.pool != "auto" and "global" not in self.outputs:
            raise ValueError(f"pool: expected global among outputs with it, found pool {self.pool} without")
        return self


class ExecutorConfig(Section):
    """Who computes. `threads` is CPU threads of one worker; `batch_size` is in images."""

    kind: Literal["inline", "ray"] = Field(default="inline", description="inline or ray")
    address: Text | None = Field(default=None, description="the address of a Ray cluster, or null")
    gpus_per_worker: Annotated[float, Field(ge=0)] | Auto = Field(
        default="auto", description="a number from 0, or auto"
    )
    workers: Positive | Auto = Field(default="auto", description=_COUNT_OR_AUTO)
    threads: Positive | Auto = Field(default="auto", description=_COUNT_OR_AUTO)
    batch_size: Positive = Field(default=64, description=_COUNT)


class ExtractConfig(Section):
    """Everything `kpu-cache extract` needs to know."""

    data: DataConfig
    views: Positive = Field(default=1, description=_COUNT)
    crop: CropSpec = CropSpec()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="a whole number from 0 to 2**63 - 1")
    out: Text = Field(description="the path or URL of the cache to make, continue or add to")
    unit_rows: Auto | Annotated[int, Field(ge=64, le=4096)] = Field(
        default="auto", description="a power of two from 64 to 4096, or auto"
    )
    codec: CodecSpec = CodecSpec()
    format: ShardFormat = Field(default="zarr", description="zarr or webdataset")
    calibration_rows: Positive | Auto = Field(default="auto", description=_COUNT_OR_AUTO)
    calibration_from: Text | None = Field(default=None, description="the path or URL of another cache, or null")
    allow_nonfinite: bool = Field(default=False, description="true or false")
    teachers: Annotated[dict[str, TeacherConfig], Field(min_length=1)] = Field(
        description="a mapping of at least one name to a teacher"
    )
    executor: ExecutorConfig = ExecutorConfig()

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
    if isinstance(config, ExtractConfig):
        return config
    if isinstance(config, Mapping):
        return validate_config(config, "config")
    return load_config(config)


def validate_config(values: Mapping[str, Any], where: str) -> ExtractConfig:
    """Validate plain values; `where` names them in messages."""
    return validate(ExtractConfig, values, where, _HOW)
