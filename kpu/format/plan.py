"""What a plan says: the source, rows, views and units of a cache."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from kpu.format.base import Frozen
from kpu.util.digests import digest_of

FORMAT = "kpu-cache"
VERSION = 1
DEFAULT_MAX_PIXELS = 2**27  # of a new plan: a frame of 100 megapixels, or a whole tile of Sentinel-2, is below it


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
    options: dict[str, str | None] = Field(default_factory=dict)
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
