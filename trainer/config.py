"""The configuration of `kpu-train`: one schema for the file, the flags and the record kept with the run."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from kpu.config.paths import anchor_paths
from kpu.config.settings import Positive, Section, read_yaml, validate, validate_overridden
from kpu.errors import KpuError
from kpu.reading.cache import open_cache
from kpu.storage.places import refuse_password, require_plain

Text = Annotated[str, Field(min_length=1)]
Target = Annotated[str, Field(pattern="^(global|patch)$")]
Width = Annotated[int, Field(gt=0, le=2**16)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Auto = Literal["auto"]

# A field's description is what a message says was expected.
_COUNT = "a whole number above 0"
_WIDTH = "a whole number from 1 to 65536"
_WEIGHT = "a number from 0"
_SHARE = "a number from 0 to 1"
_NAMES = "a list of names"

PATHS: Final = ("caches", "student.model", "student.weights", "images.root")
"""Keys of the configuration that hold paths."""

_HOW: Final = {"caches": "--cache PATH or caches"}


class StudentConfig(Section):
    """What is trained. `side` needs the cached base alone; `frozen` is the base itself, a control.

    `layers` are further outputs of the base that a side student reads, and no other; `width` and `depth` are those of
    the adapter (channels; blocks). `merge` says how base and adapter become one; `auto` is `concat` for side students.
    `model` is a timm model or `torch:<file.py>:<factory>`, for `parallel` and `full`; null means the base's own;
    `weights` is a file, `random` or null for the model's own.
    """

    kind: Literal["side", "parallel", "full", "frozen"] = Field(
        default="side", description="side, parallel, full or frozen"
    )
    model: Text | None = Field(default=None, description="timm:<model>, torch:<file.py>:<factory> or null")
    weights: Text | None = Field(default=None, description="the path of a weights file, random, or null")
    merge: Literal["auto", "add", "concat"] = Field(default="auto", description="auto, add or concat")
    layers: tuple[Text, ...] = Field(default=(), description=_NAMES)
    width: Width = Field(default=160, description=_WIDTH)
    depth: Width = Field(default=3, description=_WIDTH)

    @property
    def concat(self) -> bool:
        """Whether the student is [base, adapter], and not their sum."""
        return self.merge == "concat" or (self.merge == "auto" and self.kind == "side")

    @model_validator(mode="after")
    def _keys_belong_to_kinds(self) -> "StudentConfig":
        for key, value in (("model", self.model), ("weights", self.weights)):
            if value is not None and self.kind in ("side", "frozen"):
                raise ValueError(f"expected no {key} with kind {self.kind}, found {value!r}; remove it")
        if self.layers and self.kind != "side":
            raise ValueError(f"expected no layers with kind {self.kind}, found {list(self.layers)}; remove them")
        if self.model is None and self.kind == "full":
            raise ValueError("expected a model with kind full, found null; give timm:<model>")
        return self


class TargetsConfig(Section):
    """Where targets come from, and how their channels are normalised."""

    source: Literal["cache", "live"] = Field(default="cache", description="cache or live")
    normalize: Literal["standardize", "phi-s", "raw"] = Field(
        default="standardize", description="standardize, phi-s or raw"
    )


class ProjectorConfig(Section):
    """The heads from the student to each teacher; `hidden` is their width, `norm` a leading LayerNorm."""

    hidden: Width = Field(default=256, description=_WIDTH)
    norm: bool = Field(default=False, description="true or false")


class LossConfig(Section):
    """Weights of the parts of the pair loss."""

    cosine: NotNegative = Field(default=0.5, description=_WEIGHT)
    smooth_l1: NotNegative = Field(default=0.5, description=_WEIGHT)
    mse: NotNegative = Field(default=0.0, description=_WEIGHT)

    @model_validator(mode="after")
    def _something(self) -> "LossConfig":
        if self.cosine + self.smooth_l1 + self.mse == 0:
            raise ValueError("expected at least one weight above 0, found none")
        return self


class UnifyConfig(Section):
    """The shared latent space; with a `weight` of 0 it is off. `untrained` is a placebo: maps that never learned.

    `steps` are the batches that `pretrained` learns on; `pca` fits on as many rows as `pca_rows`. `reconstruction`,
    `variance` and `covariance` weigh the terms of the maps' own objective.
    """

    mode: Literal["off", "pretrained", "joint", "pca", "untrained"] = Field(
        default="off", description="off, pretrained, joint, pca or untrained"
    )
    weight: NotNegative = Field(default=0.3, description=_WEIGHT)
    hidden: Width = Field(default=256, description=_WIDTH)
    steps: Positive = Field(default=500, description=_COUNT)
    pca_rows: Positive = Field(default=4096, description=_COUNT)
    reconstruction: NotNegative = Field(default=1.0, description=_WEIGHT)
    variance: NotNegative = Field(default=1.0, description=_WEIGHT)
    covariance: NotNegative = Field(default=0.04, description=_WEIGHT)
    lowest_std: NotNegative = Field(default=0.1, description=_WEIGHT)
    lowest_rank: Share = Field(default=0.02, description=_SHARE)
    lowest_reconstruction: float = Field(default=0.1, description="a number")

    @field_validator("mode", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # what YAML makes of a plain off


class PreserveConfig(Section):
    """The pull that keeps the student at the base."""

    weight: NotNegative = Field(default=0.0, description=_WEIGHT)


class BalanceConfig(Section):
    """How much each teacher counts in each row; `p` is the probability with which `dropping` drops one."""

    name: Literal["uniform", "dropping"] = Field(default="uniform", description="uniform or dropping")
    p: Share = Field(default=0.5, description=_SHARE)


class OptimConfig(Section):
    """Optimiser and cosine schedule. `name` and `lr` auto depend on the kind of student.

    `warmup` is a share of all steps; `ema` the half-life of the weights' moving average in rows, 0 for none.
    `accumulate` batches make one step; `clip` is the largest gradient norm, 0 for none.
    """

    name: Literal["adamw", "muon"] | Auto = Field(default="auto", description="adamw, muon or auto")
    lr: Annotated[float, Field(gt=0)] | Auto = Field(default="auto", description="a number above 0, or auto")
    weight_decay: NotNegative = Field(default=0.05, description=_WEIGHT)
    epochs: Positive = Field(default=20, description=_COUNT)
    warmup: Share = Field(default=0.05, description=_SHARE)
    clip: NotNegative = Field(default=1.0, description=_WEIGHT)
    ema: NotNegative = Field(default=0.0, description=_WEIGHT)
    accumulate: Positive = Field(default=1, description=_COUNT)

    @field_validator("ema")
    @classmethod
    def _half_life(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError(
                f"expected a half-life in rows, 0 for none, found {value}; give a number of rows such as 100000, not "
                "a decay"
            )
        return value


class OrderConfig(Section):
    """In which order rows come; `window` is how many units `windowed` mixes."""

    name: Literal["full", "windowed"] = Field(default="full", description="full or windowed")
    window: Positive = Field(default=64, description=_COUNT)


class ImagesConfig(Section):
    """For students that need images. `root` replaces the folder or URL of the images that the cache remembers."""

    root: Text | None = Field(default=None, description="a path or URL, or null")


class LoaderConfig(Section):
    """Reading ahead: threads that read and decode, and how many batches they may be ahead.

    Rows are kept as stored, for the next epochs, in up to `memory` bytes.
    """

    threads: Positive | Auto = Field(default="auto", description=f"{_COUNT}, or auto")
    ahead: Positive = Field(default=4, description=_COUNT)
    memory: Annotated[int, Field(ge=0)] | Auto = Field(default="auto", description="a number of bytes, or auto")


class LogConfig(Section):
    """How often, in steps, metrics are written and a checkpoint is saved."""

    every: Positive = Field(default=20, description=_COUNT)
    checkpoint: Positive = Field(default=500, description=_COUNT)


class TrainConfig(Section):
    """Everything `kpu-train fit` needs to know.

    `compile` has `torch.compile` make the student faster; projectors, shared space and losses run as they are.
    `validate_every` is in steps, auto some twenty times in a training; `keep` says which weights are the run's: those
    of the best validation, or the last. A training stops early after `patience` validations that were no better.
    """

    caches: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(description="a list of at least one cache")
    base: Text = Field(description="the name of the general-purpose teacher")
    teachers: tuple[Text, ...] | None = Field(default=None, description=f"{_NAMES}, or null for all")
    outputs: Annotated[tuple[Target, ...], Field(min_length=1)] = Field(
        default=("global", "patch"), description="a list of global and patch, or of one of them"
    )
    student: StudentConfig = StudentConfig()
    targets: TargetsConfig = TargetsConfig()
    projector: ProjectorConfig = ProjectorConfig()
    loss: LossConfig = LossConfig()
    unify: UnifyConfig = UnifyConfig()
    preserve: PreserveConfig = PreserveConfig()
    balance: BalanceConfig = BalanceConfig()
    optim: OptimConfig = OptimConfig()
    batch_size: Positive = Field(default=256, description=_COUNT)
    keep: Literal["best", "last"] = Field(default="best", description="best or last")
    validate_every: Positive | Auto = Field(default="auto", description=f"{_COUNT}, or auto")
    patience: Positive | None = Field(default=None, description=f"{_COUNT}, or null")
    order: OrderConfig = OrderConfig()
    validation: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.02, description="a number from 0, below 1")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="a whole number from 0 to 2**63 - 1")
    workers: Positive = Field(default=1, description=_COUNT)
    images: ImagesConfig = ImagesConfig()
    loader: LoaderConfig = LoaderConfig()
    log: LogConfig = LogConfig()
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto, cpu or cuda")
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="auto, fp32 or bf16")
    threads: Positive | Auto = Field(default="auto", description=f"{_COUNT}, or auto")
    compile: bool = Field(default=False, description="true or false")

    @property
    def rows_per_worker(self) -> int:
        """How many rows of a step each process computes."""
        return self.batch_size // self.workers

    @field_validator("caches", "teachers", "outputs")
    @classmethod
    def _distinct(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(set(value)) != len(value):
            raise ValueError(f"expected each name once, found {list(value)}")
        return value

    @model_validator(mode="after")
    def _whole_share(self) -> "TrainConfig":
        if self.batch_size % self.workers:
            raise ValueError(f"expected a batch_size that {self.workers} workers share evenly, found {self.batch_size}")
        return self

    @model_validator(mode="after")
    def _something_to_preserve(self) -> "TrainConfig":
        if self.preserve.weight > 0 and self.student.concat:
            raise ValueError(
                f"expected preserve.weight 0 with student.merge concat, which keeps the base as it is, found "
                f"{self.preserve.weight}; leave it out, or set student.merge to add"
            )
        return self


def load_config(
    path: str | os.PathLike[str] | None,
    *,
    caches: Sequence[str] = (),
    overrides: Sequence[str] = (),
    resolved: bool = False,
) -> TrainConfig:
    """Read a YAML file, if any, lay the command line's values over it, and validate the whole once.

    Relative paths in the file begin at its folder, unless it is the `resolved` one of a run. `caches`, where any is
    given, replace the file's; `overrides` are KEY.PATH=YAML and win over everything else.

    Raises:
        ConfigError: naming the key, what was expected and what was found; or the `resolved` file names another place
            than a folder or an object store.
    """
    values = read_yaml(Path(path)) if path is not None else {}
    if path is not None and not resolved:
        anchor_paths(values, Path(path), PATHS)
    if caches:
        values["caches"] = list(caches)
    config = validate_overridden(values, overrides, str(path) if path is not None else None, validate_config)
    root = () if config.images.root is None else (config.images.root,)
    for key, places, flag in (("caches", config.caches, "--cache"), ("images.root", root, "--set images.root")):
        given = (key == "caches" and caches) or any(each.startswith(f"{key}=") for each in overrides)
        for place in places:
            refuse_password(place, key)
            if resolved and not given:
                require_plain(place, said_by=f"{path}: {key}", advice=f"give it with {flag}")
    return config


def as_config(config: TrainConfig | Mapping[str, Any] | str | os.PathLike[str]) -> TrainConfig:
    """A configuration as it is, from its plain values, or from the YAML file at a path. Raises as `load_config`."""
    if isinstance(config, TrainConfig):
        return config
    if isinstance(config, Mapping):
        return validate_config(config, "config")
    return load_config(config)


def validate_config(values: Mapping[str, Any], where: str) -> TrainConfig:
    """Validate plain values; `where` names them in messages."""
    how = _HOW if "base" in values else {**_HOW, "base": _how_to_name_a_base(values.get("caches"))}
    return validate(TrainConfig, values, where, how)


def _how_to_name_a_base(caches: Any) -> str:
    """With the teachers that there are to choose from, as far as the caches can be opened."""
    names: dict[str, None] = {}
    for path in caches if isinstance(caches, list | tuple) else ():
        with suppress(KpuError, TypeError):
            names |= dict.fromkeys(sorted(open_cache(path).teachers))
    return "--set base=NAME or base" + (f", one of {', '.join(names)}" if names else "")
