"""The sections of an extraction's configuration."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from kpu.config.settings import COUNT, COUNT_OR_AUTO, Positive, Section, setting
from kpu.format.teacher import CodecSpec, Pool
from kpu.format.timm_args import ModelArgs

Text = Annotated[str, Field(min_length=1)]
Auto = Literal["auto"]

# What a message says was expected.
_COUNT_OR_NULL = f"{COUNT}, or null"
_THREE = "three numbers, of red, green and blue, or null"
_MODEL = "timm:<model>, hf:<id or folder> or torch:<module or path/to/file.py>:<factory>"


class DataConfig(Section):
    """Where the images are, and how they are read."""

    source: Text | tuple[Text, ...] = setting("a path, URL or pattern, or a list of them")
    """Images: a folder, WebDataset tars, Parquet files, or a list of these; globs and braces are expanded."""
    image: Text | None = setting("a name, or null", default=None)
    """The column of images in Parquet files; in tars the ending, such as `jpg;png`. Null finds it."""
    label: Text | Literal[False] | None = setting("a name, false for no labels, or null", default=None)
    """The column of labels, or the ending in tars. Labels are class numbers; those below 0 mean none. False leaves
    labels out.
    """
    key: Text | None = setting("a name, or null", default=None)
    """The column of keys in Parquet files. Null makes keys of file and row."""
    limit: Positive | None = setting(_COUNT_OR_NULL, default=None)
    """Use the first images only, for a trial."""
    max_pixels: Positive | None = setting(_COUNT_OR_NULL, default=None)
    """Mask larger images. Null is 134,217,728 for a new cache, and what it was begun with for an old one."""
    bits: Annotated[int, Field(ge=8, le=16)] | None = setting("a whole number from 8 to 16, or null", default=None)
    """How many of 16 bits the images use, for 10 or 12 bits in files that do not say so (PNG's sBIT, TIFF's
    MaxSampleValue). Without it, images that use 12 bits or fewer are masked.
    """


class InputConfig(Section):
    """Changes to a teacher's own preprocessing."""

    size: Positive | tuple[Positive, Positive] | None = setting(
        "a whole number of pixels above 0, [height, width], or null", default=None
    )
    """Pixels of the square input, or [height, width]."""
    mean: tuple[float, float, float] | None = setting(_THREE, default=None)
    """Subtracted after scaling to 0..1."""
    std: tuple[float, float, float] | None = setting(_THREE, default=None)
    """Divided by after that."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = setting(
        "nearest, bilinear, bicubic, lanczos or null", default=None
    )
    """How images are resized."""
    crop: Annotated[float, Field(gt=0, le=1)] | None = setting("a number above 0, at most 1, or null", default=None)
    """The share of the resized image that the centre crop keeps: timm's `crop_pct`."""
    crop_mode: Literal["center", "squash", "pad"] | None = setting("center, squash, pad or null", default=None)
    """`center` crops, `squash` scales both sides whatever the proportions, `pad` fits the image in and fills up with
    the mean.
    """
    crop_rounding: Literal["round", "floor"] | None = setting("round, floor or null", default=None)
    """Where an odd margin puts the centre: `floor` as transformers does, `round` as timm does."""
    channels: Literal["rgb", "bgr"] | None = setting("rgb, bgr or null", default=None)
    """`bgr` gives blue first."""


class TeacherConfig(Section):
    """One frozen teacher."""

    model: str = setting(_MODEL)
    """The teacher: see the page on teachers."""
    weights: Text | None = setting("the path of a weights file, random, or null for the model's own", default=None)
    """A safetensors file or a checkpoint (`file.pth#entry` names one of several sets); `random` is for tests."""
    outputs: tuple[Literal["global", "patch"], ...] = setting(
        "a list of global and patch, or of one of them", default=("global", "patch")
    )
    """`global`, one vector an image, and `patch`, the final map."""
    layers: tuple[int | str, ...] = setting("a list of numbers or names of layers", default=())
    """Intermediate maps, cached as `layer<number>.patch`: numbers of blocks for timm and hf, names of outputs for a
    module of your own.
    """
    pool: Pool | Auto = setting("auto, cls, mean, cls+mean or pooler", default="auto")
    """What `global` is: `auto` is what the model's own classifier sees or its pooler gives; `cls`, `mean` and
    `cls+mean` are pooled from the tokens of `patch`; `pooler` insists on the model's own (hf).
    """
    unproven: Literal["refuse", "accept"] = setting("refuse or accept", default="refuse")
    """Whether to accept maps whose order no change of a picture shows."""
    labels: tuple[int | str | None, ...] | None = setting(
        "a list of names or numbers of classes and nulls, or null", default=None
    )
    """Which class of the data each output of the teacher's head means, null for none: its name, or the number of its
    label. Prefer names: numbers mean other classes in a folder that lacks one.
    """
    model_args: ModelArgs | None = setting("a mapping of timm's arguments, or null", default=None)
    """Arguments of timm's `create_model`, layers by name, as a model card gives them."""
    input: InputConfig | None = None
    """Changes to the teacher's own preprocessing."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto, fp32, bf16 or fp16", default="auto")
    """Of the forward pass. Auto is bf16 on a GPU, fp32 elsewhere."""
    compile: bool = setting("true or false", default=False)
    """Run the teacher through `torch.compile`."""
    codec: CodecSpec | None = None
    """How this teacher is stored, if not as `codec` says."""

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
    """Who computes."""

    kind: Literal["inline", "ray"] = setting("inline or ray", default="inline")
    """`inline` uses one GPU in this process; `ray` gives every GPU of a machine or cluster a worker."""
    address: Text | None = setting("the address of a Ray cluster, or null", default=None)
    """A running Ray cluster; null starts one on this machine."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | Auto = setting("a number from 0, or auto", default="auto")
    """0.5 puts two workers on a GPU."""
    workers: Positive | Auto = setting(COUNT_OR_AUTO, default="auto")
    """How many Ray workers. Auto is as many as there are GPUs, or CPUs for."""
    threads: Positive | Auto = setting(COUNT_OR_AUTO, default="auto")
    """CPU threads of one worker. Fixed by the plan of the cache."""
    batch_size: Positive = setting(COUNT, default=64)
    """Images in a forward pass."""
