"""The configuration of `kpu-train`: one schema for the file, the flags and the record kept with the run."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal

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
    setting,
    validate,
    validate_overridden,
)
from kpu.errors import KpuError
from kpu.reading.cache import open_cache
from kpu.storage.places import refuse_password, require_plain
from trainer.sections import (
    NAMES,
    Auto,
    BalanceConfig,
    ImagesConfig,
    LoaderConfig,
    LogConfig,
    LossConfig,
    OptimConfig,
    OrderConfig,
    PreserveConfig,
    ProjectorConfig,
    StudentConfig,
    TargetsConfig,
    Text,
    UnifyConfig,
)

Target = Annotated[str, Field(pattern="^(global|patch)$")]


PATHS: Final = ("caches", "student.model", "student.weights", "images.root")
"""Keys of the configuration that hold paths."""

_HOW: Final = {"caches": "--cache PATH or caches"}


class TrainConfig(Section):
    """Everything `kpu-train fit` needs to know."""

    caches: Annotated[tuple[Text, ...], Field(min_length=1)] = setting("a list of at least one cache")
    """Where the features are. Several may be mixed, each with the teachers it has."""
    base: Text = setting("the name of the general-purpose teacher")
    """The general-purpose teacher, which is kept as the knowledge base."""
    teachers: tuple[Text, ...] | None = setting(f"{NAMES}, or null for all", default=None)
    """Whose features to learn, the base among them; null for all in the caches."""
    outputs: Annotated[tuple[Target, ...], Field(min_length=1)] = setting(
        "a list of global and patch, or of one of them", default=("global", "patch")
    )
    """Which outputs to learn."""
    student: StudentConfig = StudentConfig()
    """What is trained."""
    targets: TargetsConfig = TargetsConfig()
    """Where targets come from."""
    projector: ProjectorConfig = ProjectorConfig()
    """The heads from the student to each teacher."""
    loss: LossConfig = LossConfig()
    """The distance between what the student predicts and a teacher's features."""
    unify: UnifyConfig = UnifyConfig()
    """The shared latent space."""
    preserve: PreserveConfig = PreserveConfig()
    """The pull that keeps the student at the base."""
    balance: BalanceConfig = BalanceConfig()
    """How teachers are weighed."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    batch_size: Positive = setting(COUNT, default=256)
    """Rows of one step, of all workers together."""
    keep: Literal["best", "last"] = setting("best or last", default="best")
    """Which weights become `model.safetensors`: those of the best validation (by R2), or the last. The others are kept
    beside them.
    """
    validate_every: Positive | Auto = setting(COUNT_OR_AUTO, default="auto")
    """Steps. Auto is about twenty times in a training."""
    patience: Positive | None = setting(f"{COUNT}, or null", default=None)
    """Stop early after this many validations that were no better than the best."""
    order: OrderConfig = OrderConfig()
    """In which order rows come."""
    validation: Annotated[float, Field(ge=0, lt=1)] = setting("a number from 0, below 1", default=0.02)
    """The share of samples held back."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = setting("a whole number from 0 to 2**63 - 1", default=0)
    """Of weights, order and validation rows."""
    workers: Positive = setting(COUNT, default=1)
    """Processes, by Ray Train or torchrun; divides `batch_size`."""
    images: ImagesConfig = ImagesConfig()
    """For students that need images."""
    loader: LoaderConfig = LoaderConfig()
    """Reading ahead."""
    log: LogConfig = LogConfig()
    """How often metrics and checkpoints are written."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto, cpu or cuda", default="auto")
    """Auto is a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = setting("auto, fp32 or bf16", default="auto")
    """Auto is bf16 on a GPU, fp32 elsewhere."""
    threads: Positive | Auto = setting(COUNT_OR_AUTO, default="auto")
    """CPU threads of torch in each process."""
    compile: bool = setting("true or false", default=False)
    """Run the student through `torch.compile`; projectors, shared space and losses run as they are."""

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
        check_command(values, path, "kpu-train fit")
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
    return as_schema(TrainConfig, config, validate_config, load_config)


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
