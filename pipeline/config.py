"""The configuration of `kpu-cache extract`: one schema for the file, the flags and the record kept with the cache."""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cache import layout
from cache.errors import ConfigError
from cache.spec import CodecSpec

Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Section):
    """Where the images are. `image`, `label` and `key` name columns or members where the default is not right."""

    source: str | tuple[str, ...]
    image: str | None = None
    label: str | None = None
    key: str | None = None
    limit: Positive | None = None


class InputConfig(Section):
    """What to change of a teacher's own preprocessing; `crop` is timm's crop_pct."""

    size: Positive | tuple[Positive, Positive] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    crop: Annotated[float, Field(gt=0, le=1)] | None = None


class TeacherConfig(Section):
    """One frozen teacher. `model` is `timm:<model>`, `hf:<id or folder>` or `torch:<module or file.py>:<factory>`."""

    model: str
    weights: str | None = None
    outputs: tuple[Literal["global", "patch"], ...] = ("global", "patch")
    layers: tuple[int | str, ...] = ()
    labels: tuple[int | None, ...] | None = None
    input: InputConfig | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    codec: CodecSpec | None = None

    @field_validator("model")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        kind, separator, rest = value.partition(":")
        if not separator or not rest or kind not in ("timm", "hf", "torch"):
            raise ValueError(
                "expected timm:<model>, hf:<id or folder> or torch:<module or path/to/file.py>:<factory>, "
                f"found {value!r}"
            )
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
    def _emits_something(self) -> "TeacherConfig":
        if not self.outputs and not self.layers:
            raise ValueError("expected at least one of outputs and layers, found neither")
        return self


class ExecutorConfig(Section):
    """Who computes. `threads` is CPU threads of one worker; `batch_size` is in images."""

    kind: Literal["inline", "ray"] = "inline"
    address: str | None = None
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    workers: Positive | Literal["auto"] = "auto"
    threads: Positive | Literal["auto"] = "auto"
    batch_size: Positive = 64


class ExtractConfig(Section):
    """Everything `kpu-cache extract` needs to know."""

    data: DataConfig
    views: Positive = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    out: str
    unit_rows: Literal["auto"] | Annotated[int, Field(ge=64, le=4096)] = "auto"
    codec: CodecSpec = CodecSpec()
    calibration_rows: Positive | Literal["auto"] = "auto"
    calibration_from: str | None = None
    allow_nonfinite: bool = False
    teachers: Annotated[dict[str, TeacherConfig], Field(min_length=1)]
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
                layout.check_name("teacher", name)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return value

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
) -> ExtractConfig:
    """Read a YAML file, lay the command line's values over it, and validate the whole once.

    `teachers` are NAME=MODEL, `overrides` KEY.PATH=YAML; overrides win over everything else.

    Raises:
        ConfigError: naming the key, what was expected and what was found.
    """
    values: dict[str, Any] = _read_yaml(Path(path)) if path is not None else {}
    for assignment in teachers:
        name, model = _split(assignment, "--teacher", "NAME=MODEL")
        _section(values, ["teachers", name])["model"] = model
    flags = {"data.source": data, "out": out, "executor.kind": executor, "executor.address": ray_address}
    for key, value in flags.items():
        if value is not None:
            *parents, leaf = key.split(".")
            _section(values, parents)[leaf] = value
    for assignment in overrides:
        _assign(values, *_split(assignment, "--set", "KEY=VALUE"))
    return validate_config(values, str(path) if path is not None else "command line")


def validate_config(values: Mapping[str, Any], where: str) -> ExtractConfig:
    """Validate plain values; `where` names them in messages."""
    try:
        return ExtractConfig.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(values).__name__}")
    return values


def _split(assignment: str, flag: str, form: str) -> tuple[str, str]:
    key, separator, value = assignment.partition("=")
    if not separator or not key or not value:
        raise ConfigError(f"{flag} {assignment!r}: expected {form}")
    return key, value


def _assign(values: dict[str, Any], key: str, text: str) -> None:
    *parents, leaf = key.split(".")
    try:
        _section(values, parents)[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}={text}: the value is not YAML: {error}") from None


def _section(values: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for depth, name in enumerate(path):
        child = values.setdefault(name, {})
        if child is None:
            child = values[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{'.'.join(path[: depth + 1])}: expected a mapping of keys, found {child!r}")
        values = child
    return values


def _explain(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = sorted(_known_keys(location[:-1]))
        near = difflib.get_close_matches(location[-1], known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
        return f"unknown key {key!r}; {advice}"
    if item["type"] == "missing":
        return f"{key}: is required and was not given"
    message = item["msg"].removeprefix("Value error, ")
    found = "" if "found" in message else f", found {item['input']!r}"
    return f"{key}: {message}{found}"


def _known_keys(location: Sequence[str]) -> set[str]:
    model: Any = ExtractConfig
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = _section_type(model.model_fields[part].annotation)
    return set(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else set()


def _section_type(annotation: Any) -> Any:
    """The Section inside `Section | None` or `dict[str, Section]`."""
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), annotation)
