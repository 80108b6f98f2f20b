"""What a cache says of a teacher: its model, preprocessing, outputs and codec."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from kpu.errors import ConfigError
from kpu.format.base import MOST_VALUES, Frozen, Length
from kpu.format.timm_args import ModelArgs
from kpu.util.digests import digest_of

DEFAULT_STEP = 0.05
NO_LABEL = -1  # among a teacher's labels
LOCAL_DIR = "local-dir:"  # before a folder, in the name of a timm model
ShardFormat = Literal["zarr", "webdataset"]
Pool = Literal["cls", "mean", "cls+mean", "pooler"]
_ON_GRID = ("uniform", "rotated")
_EXTRA = "extra_digest"
# Fields of a teacher that earlier releases did not have.
_LEFT_OUT_IF_NONE = (_EXTRA, "model_args", "no_head", "pool", "pooling", "unproven")


class CodecSpec(Frozen):
    """How features are stored."""

    name: Literal["uniform", "rotated", "fp32", "fp16", "bf16"] = "uniform"
    """`uniform` and `rotated` (smaller for ViTs) quantise; the others store numbers of that format."""
    step: Annotated[float, Field(gt=0, le=1)] | None = None
    """Width of the quantisation grid in standard deviations of a channel; null is 0.05. Only for grids."""

    @model_validator(mode="before")
    @classmethod
    def _default_step(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("name", "uniform") in _ON_GRID and value.get("step") is None:
            return {**value, "step": DEFAULT_STEP}
        return value

    @model_validator(mode="after")
    def _step_belongs_to_grids(self) -> "CodecSpec":
        if self.name not in _ON_GRID and self.step is not None:
            raise ValueError(f"step is only for {' and '.join(_ON_GRID)}, found step={self.step} with {self.name}")
        return self

    @property
    def item_bytes(self) -> int:
        """Bytes of one stored value before compression."""
        return 4 if self.name == "fp32" else 2


class OutputSpec(Frozen):
    """One named output of a teacher: `shape` is (D,) or (T, D); `grid` is (H, W) with H * W = T for maps."""

    name: str
    shape: Annotated[tuple[Length, ...], Field(min_length=1, max_length=2)]
    grid: tuple[Length, Length] | None = None

    @model_validator(mode="after")
    def _grid_holds_the_tokens(self) -> "OutputSpec":
        if math.prod(self.shape) > MOST_VALUES:
            raise ValueError(f"expected up to {MOST_VALUES} values, found shape {list(self.shape)}")
        if self.grid is not None and (len(self.shape), math.prod(self.grid)) != (2, self.shape[0]):
            raise ValueError(f"expected a grid of as many tokens as shape {list(self.shape)}, found {list(self.grid)}")
        return self

    @property
    def channels(self) -> int:
        return self.shape[-1]

    @property
    def tokens(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1


class InputSpec(Frozen):
    """A teacher's preprocessing. The shorter side is resized to `size / crop`, then the centre is cropped to `size`.

    `size` is (H, W) in pixels; `mean` and `std` are per channel scaled to 0..1. With `crop_mode` squash both sides are
    resized to `size / crop`, whatever the image's proportions (timm's names); with pad the image is resized to fit into
    `size`, and what is left on the right and below gets the colour of `mean`, as in SAM. Where an odd number of pixels
    is cut, `crop_rounding` says where the centre lies: rounded half to even, as in timm, or down, as in transformers.
    `channels` is the order in which the model takes them, and that of `mean` and `std`. The last two are left out of
    documents where they are the default.
    """

    size: tuple[Length, Length]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    crop_mode: Literal["center", "squash", "pad"] = "center"
    crop_rounding: Literal["round", "floor"] = "round"
    channels: Literal["rgb", "bgr"] = "rgb"

    @model_validator(mode="after")
    def _padding_cuts_nothing(self) -> "InputSpec":
        if self.crop_mode == "pad" and self.crop != 1:
            raise ValueError(f"expected crop 1 with crop_mode pad, found {self.crop}")
        return self

    @model_serializer(mode="wrap")
    def _serialise(self, plainly: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plainly(self)
        defaults = {"crop_rounding": "round", "channels": "rgb"}
        return {key: value for key, value in values.items() if value != defaults.get(key)}


class TeacherSpec(Frozen):
    """Everything that decides a teacher's features and how they are stored.

    `model`, `weights` are what the user wrote; `weights_digest` is of the parameters as loaded, `source_digest` of
    the Python file that defines a `torch:` model. `extra_digest` is of what else computes (compiled programs, files,
    tensors in no state_dict), None if there is nothing or an earlier release did not look. `model_args` are timm's
    own arguments, None if the user gave none; `no_head` says why a classifier was not kept, and decides nothing.
    These three are left out of documents where they are None. `labels` says which data label each output of the head
    means, by number or by the name of its class (-1: none). `outputs` are in stored order. `format` is that of the
    shards: it changes no stored value. `input` is None for a teacher whose features were imported: it is not known, and
    the teacher cannot be run.

    `pool` is what the user chose `global` to be pooled by, None for the model's own way; `pooling` says in words what
    it is. `unproven` names the maps whose order was taken on the word of the model's library, or of the user, for no
    change of an image shows it. These three are left out of documents where they are None; the last two do not count
    for the fingerprint.
    """

    name: str
    model: str
    weights: str | None
    weights_digest: str
    source_digest: str | None = None
    extra_digest: str | None = None
    input: InputSpec | None
    precision: Literal["fp32", "bf16", "fp16"]
    outputs: tuple[OutputSpec, ...]
    labels: tuple[int | str, ...] | None = None
    has_head: bool = False
    model_args: ModelArgs | None = None
    no_head: str | None = None
    codec: CodecSpec
    format: ShardFormat = "zarr"
    pool: Pool | None = None
    pooling: str | None = None
    unproven: tuple[str, ...] | None = None

    @model_serializer(mode="wrap")
    def _serialise(self, plainly: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plainly(self)
        return {key: value for key, value in values.items() if value is not None or key not in _LEFT_OUT_IF_NONE}

    @property
    def known_input(self) -> InputSpec:
        """The preprocessing, for whoever is to run the teacher on images.

        Raises:
            ConfigError: its features were imported.
        """
        if self.input is None:
            raise ConfigError(
                f"teacher {self.name!r} ({self.model}): expected a teacher that can be run on images, found one whose "
                "features were imported: neither its model nor its preprocessing is known here, so it cannot be run "
                "again; what reads cached features alone still works with it"
            )
        return self.input

    @property
    def held_bytes_per_row(self) -> int:
        """Bytes of one row of all outputs in memory, as stored but not compressed."""
        return sum(math.prod(output.shape) for output in self.outputs) * self.codec.item_bytes

    @property
    def model_part(self) -> dict[str, Any]:
        """What decides the features, without how they are stored nor where the weights were read from."""
        stored = {"name", "weights", "codec", "labels", "has_head", "no_head", "format", "pooling", "unproven"}
        parts = self.model_dump(mode="json", exclude=stored)
        kind, _, rest = self.model.partition(":")
        if kind == "torch":  # the file may move; its content is in source_digest
            parts["model"] = f"torch:{rest.rpartition(':')[2]}"
        elif kind == "hf" and rest.startswith("/"):  # so may the folder; its weights are in weights_digest
            parts["model"] = "hf:"
        elif kind == "timm" and rest.startswith(LOCAL_DIR):  # and this one
            parts["model"] = f"timm:{LOCAL_DIR}"
        return parts

    @property
    def model_fingerprint(self) -> str:
        return digest_of(self.model_part)

    def model_differences(self, other: "TeacherSpec") -> list[str]:
        """Fields in which the features of two teachers differ. `extra_digest` counts where both have one."""
        one, two = self.model_part, other.model_part
        return [
            key
            for key in dict.fromkeys([*one, *two])
            if one.get(key) != two.get(key) and not (key == _EXTRA and None in (one.get(key), two.get(key)))
        ]
