"""The words of the format as values: what a plan, a teacher and a commit record say. Validated on the way in."""

import math
from enum import IntEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from kpu.errors import ConfigError
from kpu.format.timm_args import ModelArgs
from kpu.util.digests import digest_of

FORMAT = "kpu-cache"
VERSION = 1
DEFAULT_STEP = 0.05
DEFAULT_MAX_PIXELS = 2**27  # of a new plan: a frame of 100 megapixels, or a whole tile of Sentinel-2, is below it
NO_LABEL = -1  # among a teacher's labels
LOCAL_DIR = "local-dir:"  # before a folder, in the name of a timm model
ShardFormat = Literal["zarr", "webdataset"]
Pool = Literal["cls", "mean", "cls+mean", "pooler"]
_ON_GRID = ("uniform", "rotated")
_EXTRA = "extra_digest"
# Fields of a teacher that earlier releases did not have.
_LEFT_OUT_IF_NONE = (_EXTRA, "model_args", "no_head", "pool", "pooling", "unproven")


# Bounds of what a stranger's file may claim, far beyond anything real: nothing is allocated by larger numbers.
Count = Annotated[int, Field(ge=0, lt=2**63)]
MOST_LENGTH = 2**24
Length = Annotated[int, Field(ge=1, le=MOST_LENGTH)]
"""Of one dimension of an array or an image."""
MOST_VALUES = 2**28
"""Of one output in one row."""


class Frozen(BaseModel):
    """A validated, immutable value that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ImageStatus(IntEnum):
    """What decoding found in a row, as stored in `images/status`. Every value but OK masks the row in all teachers."""

    OK = 0
    EMPTY = 1  # zero bytes, or no bytes at all
    NOT_AN_IMAGE = 2  # no decoder recognises it
    TRUNCATED = 3  # recognised, but the pixel data ends early or is broken
    TOO_LARGE = 4  # more pixels than `data.max_pixels`
    UNSUPPORTED_PIXELS = 5  # a depth, sample format or compression that is not decoded, or not rightly
    SEVERAL_BANDS = 6  # more channels than colours and alpha
    SEVERAL_PAGES = 7  # a TIFF of several images
    DEPTH_UNKNOWN = 8  # 16 bits of which it is not known how many are used
    TOO_MANY_SCANS = 9  # a JPEG that takes more passes than any encoder writes
    PATH_WITHOUT_FILE = 10  # a path in place of bytes, and no such file beside it
    HEIC_WITHOUT_PLUGIN = 11
    JXL_WITHOUT_PLUGIN = 12
    CAMERA_RAW = 13
    EPS = 14
    PDF = 15
    SVG = 16
    PSD = 17
    DICOM = 18
    OTHER_FORMAT = 19  # another image format that is known by its signature and not decoded
    NOT_WRITTEN = 255  # the fill value


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
    tensors in no state_dict), None where there is nothing or an earlier release did not look. `model_args` are timm's
    own arguments, None where the user gave none; `no_head` says why a classifier was not kept, and decides nothing.
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


class CropSpec(Frozen):
    """How views are cropped, as by torchvision's RandomResizedCrop."""

    scale: tuple[float, float] = (0.08, 1.0)
    """The area of a crop, from and to, as a share of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width to height of a crop, from and to."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The probability of a horizontal flip."""

    @model_validator(mode="after")
    def _ordered(self) -> "CropSpec":
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"expected a scale [from, to] above 0, up to 1, found {list(self.scale)}")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"expected a ratio [from, to] above 0, found {list(self.ratio)}")
        return self


class Decoding(Frozen):
    """What decides, beside its bytes, which pixels an image has; the defaults are those of plans that do not say.

    Images of more than `max_pixels` are masked. `bits` is how many of 16 bits a sample uses, None to go by the file.
    """

    max_pixels: Annotated[int, Field(gt=0)] = 178_956_970
    bits: Annotated[int, Field(ge=8, le=16)] | None = None


class SourceSpec(Frozen):
    """Where images come from, enough to read them again. `files` below `root` are named in the sample table.

    `decoding` is left out of the document where it has its defaults.
    """

    kind: Literal["folder", "tar", "parquet"]
    root: str
    options: dict[str, str | None] = {}
    decoding: Decoding = Decoding()

    @model_serializer(mode="wrap")
    def _serialise(self, plainly: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plainly(self)
        if self.decoding == Decoding():
            del values["decoding"]
        return values


class Plan(Frozen):
    """`plan.json`: fixed once, before anything else. Row numbers, keys and units never change afterwards.

    `fingerprint` digests the ordered sample table; `samples_digests` the raw bytes of its files; `metadata` those of
    the `zarr.json` files of the root, `teachers` and `images`. `threads` is the CPU thread count of the teachers:
    results are bit-identical only at equal counts. `crop` is that of several views, None for the plain full view, and
    then left out of the document.
    """

    source: SourceSpec
    fingerprint: str
    classes: tuple[str, ...] | None
    samples: int
    views: int
    seed: int
    unit_rows: int
    threads: int
    samples_digests: tuple[str, ...]
    metadata: dict[str, str]
    crop: CropSpec | None = None

    @model_serializer(mode="wrap")
    def _serialise(self, plainly: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plainly(self)
        return values if values["crop"] is not None else {key: values[key] for key in values if key != "crop"}

    @property
    def rows(self) -> int:
        return self.samples * self.views

    @property
    def units(self) -> int:
        return -(-self.rows // self.unit_rows)

    def unit_range(self, unit: int) -> range:
        """Row numbers of `unit`."""
        if not 0 <= unit < self.units:
            raise IndexError(f"unit {unit} of {self.units}")
        return range(unit * self.unit_rows, min((unit + 1) * self.unit_rows, self.rows))

    @property
    def digest(self) -> str:
        return digest_of(self.model_dump(mode="json"))


class Fidelity(Frozen):
    """Stored against unquantised features of one unit's valid rows, in channel standard deviations.

    `rmse` over all values; `cosine` the mean over tokens, of standardised features; `worst_row` the row with the
    largest RMSE, `worst_rmse` that RMSE; `saturated` the number of values outside the integer range.
    """

    rmse: float
    cosine: float
    worst_row: Count
    worst_rmse: float
    saturated: Count


class ShardRecord(Frozen):
    """Size and seal of one published shard."""

    bytes: Count
    seal: str


class OutputRecord(ShardRecord):
    """A teacher's shard with what storing it cost in precision; no fidelity where no row is valid."""

    fidelity: Fidelity | None


class ImagesRecord(Frozen):
    """`images/commits/<unit>.json`."""

    unit: int
    plan: str
    row_digest: str
    masked: Count
    masked_digest: str
    arrays: dict[str, ShardRecord]


class UnitRecord(Frozen):
    """`teachers/<teacher>/commits/<unit>.json`: a function of the content alone.

    `files` digests the raw bytes of the teacher's `zarr.json`, which digests its other files. `nonfinite`
    is a hexadecimal bit map over the unit's rows (first row = highest bit of the first digit) of rows that this
    teacher alone masks, empty where there is none.
    """

    unit: int
    plan: str
    row_digest: str
    teacher: str
    fingerprint: str
    files: dict[str, str]
    masked: Count
    masked_digest: str
    nonfinite: str = ""
    outputs: dict[str, OutputRecord]
