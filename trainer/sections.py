"""The sections of a training's configuration."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kpu.config.settings import COUNT, COUNT_OR_AUTO, Positive, Section, setting

Text = Annotated[str, Field(min_length=1)]
Width = Annotated[int, Field(gt=0, le=2**16)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Auto = Literal["auto"]

# What a message says was expected.
NAMES = "a list of names"
_WIDTH = "a whole number from 1 to 65536"
_WEIGHT = "a number from 0"
_SHARE = "a number from 0 to 1"


class StudentConfig(Section):
    """What is trained."""

    kind: Literal["side", "parallel", "full", "frozen"] = setting("side, parallel, full or frozen", default="side")
    """`side`: an adapter on the cached outputs of the base. `parallel`: the frozen base with adapters beside its
    blocks. `full`: a model trained whole. `frozen`: the base as it is, a control.
    """
    model: Text | None = setting("timm:<model>, torch:<file.py>:<factory> or null", default=None)
    """For `parallel` and `full`; null means the base's own."""
    weights: Text | None = setting("the path of a weights file, random, or null", default=None)
    """To start from; null for the model's own."""
    merge: Literal["auto", "add", "concat"] = setting("auto, add or concat", default="auto")
    """How base and adapter become one: `add`, or `concat`, which keeps the base in the student as it is. Auto is
    `concat` for side students.
    """
    layers: tuple[Text, ...] = setting(NAMES, default=())
    """Further outputs of the base that a side student reads, such as `layer5.patch`."""
    width: Width = setting(_WIDTH, default=160)
    """Channels of the adapter."""
    depth: Width = setting(_WIDTH, default=3)
    """Blocks of the adapter."""

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

    source: Literal["cache", "live"] = setting("cache or live", default="cache")
    """`live` runs the teachers at every step instead of reading the cache, to compare."""
    normalize: Literal["standardize", "phi-s", "raw"] = setting("standardize, phi-s or raw", default="standardize")
    """How the channels of targets are normalised. `phi-s` is that of RADIO."""


class ProjectorConfig(Section):
    """The heads from the student to each teacher."""

    hidden: Width = setting(_WIDTH, default=256)
    """Width of the head to each teacher."""
    norm: bool = setting("true or false", default=False)
    """Begin each head with a LayerNorm."""


class LossConfig(Section):
    """Weights of the parts of the pair loss."""

    cosine: NotNegative = setting(_WEIGHT, default=0.5)
    """Weight of the cosine distance."""
    smooth_l1: NotNegative = setting(_WEIGHT, default=0.5)
    """Weight of the smooth L1 distance."""
    mse: NotNegative = setting(_WEIGHT, default=0.0)
    """Weight of the squared distance."""

    @model_validator(mode="after")
    def _something(self) -> "LossConfig":
        if self.cosine + self.smooth_l1 + self.mse == 0:
            raise ValueError("expected at least one weight above 0, found none")
        return self


class UnifyConfig(Section):
    """The shared latent space."""

    mode: Literal["off", "pretrained", "joint", "pca", "untrained"] = setting(
        "off, pretrained, joint, pca or untrained", default="off"
    )
    """The shared latent space: `pretrained` before the student, `joint` with it, by `pca`, or `untrained`, a placebo.
    """
    weight: NotNegative = setting(_WEIGHT, default=0.3)
    """Of the loss in the shared space, lu; 0 turns it off."""
    hidden: Width = setting(_WIDTH, default=256)
    """Width of the maps into the space."""
    steps: Positive = setting(COUNT, default=500)
    """Batches that `pretrained` learns on."""
    pca_rows: Positive = setting(COUNT, default=4096)
    """Rows that `pca` fits on."""
    reconstruction: NotNegative = setting(_WEIGHT, default=1.0)
    """Weight of a term of the maps' own objective."""
    variance: NotNegative = setting(_WEIGHT, default=1.0)
    """Weight of a term of the maps' own objective."""
    covariance: NotNegative = setting(_WEIGHT, default=0.04)
    """Weight of a term of the maps' own objective."""
    lowest_std: NotNegative = setting(_WEIGHT, default=0.1)
    """The run is refused if the space's standard deviation is lower."""
    lowest_rank: Share = setting(_SHARE, default=0.02)
    """The run is refused if the space's effective rank is a lower share of its width."""
    lowest_reconstruction: float = setting("a number", default=0.1)
    """The run is refused if the maps reconstruct teachers with a lower R2."""

    @field_validator("mode", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # what YAML makes of a plain off


class PreserveConfig(Section):
    """The pull that keeps the student at the base."""

    weight: NotNegative = setting(_WEIGHT, default=0.0)
    """How much it costs to leave the base, with `merge: add`."""


class BalanceConfig(Section):
    """How much each teacher counts in each row."""

    name: Literal["uniform", "dropping"] = setting("uniform or dropping", default="uniform")
    """How much each teacher counts in each row."""
    p: Share = setting(_SHARE, default=0.5)
    """The probability with which `dropping` drops a teacher."""


class OptimConfig(Section):
    """Optimiser and cosine schedule."""

    name: Literal["adamw", "muon"] | Auto = setting("adamw, muon or auto", default="auto")
    """Auto depends on the kind of student."""
    lr: Annotated[float, Field(gt=0)] | Auto = setting("a number above 0, or auto", default="auto")
    """The peak of a cosine schedule. Auto depends on the kind of student."""
    weight_decay: NotNegative = setting(_WEIGHT, default=0.05)
    """Of matrices."""
    epochs: Positive = setting(COUNT, default=20)
    """Passes over the training rows."""
    warmup: Share = setting(_SHARE, default=0.05)
    """A share of all steps."""
    clip: NotNegative = setting(_WEIGHT, default=1.0)
    """The largest gradient norm, 0 for none."""
    ema: NotNegative = setting(_WEIGHT, default=0.0)
    """Half-life, in rows, of a moving average of the weights (100000, say; it is not a decay), 0 for none."""
    accumulate: Positive = setting(COUNT, default=1)
    """Batches that make one update."""

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
    """In which order rows come."""

    name: Literal["full", "windowed"] = setting("full or windowed", default="full")
    """`full` is a permutation of all rows; `windowed` reads unit by unit, for object stores."""
    window: Positive = setting(COUNT, default=64)
    """How many units `windowed` mixes."""


class ImagesConfig(Section):
    """For students that need images."""

    root: Text | None = setting("a path or URL, or null", default=None)
    """Where the images are now, if they moved: replaces the root that the cache remembers."""


class LoaderConfig(Section):
    """Reading ahead, and keeping rows for the next epochs."""

    threads: Positive | Auto = setting(COUNT_OR_AUTO, default="auto")
    """That read and decode."""
    ahead: Positive = setting(COUNT, default=4)
    """Batches that they may be ahead."""
    memory: Annotated[int, Field(ge=0)] | Auto = setting("a number of bytes, or auto", default="auto")
    """Bytes in which rows are kept, as stored, for the next epochs."""


class LogConfig(Section):
    """How often metrics and checkpoints are written."""

    every: Positive = setting(COUNT, default=20)
    """Steps between lines of metrics."""
    checkpoint: Positive = setting(COUNT, default=500)
    """Steps between checkpoints."""
