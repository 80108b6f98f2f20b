"""How features become stored values and back.

`uniform`: `value = centre + scale * stored`, per channel.

`rotated`: `value = centre + scale * (unfold(stored) @ axes)`. Standardised features, turned onto the principal axes of
the calibration rows, are stored on one grid for all axes. Most of their variance lies on few axes, and the others take
few bits: 0, -1, 1, -2 steps are stored as 0, 1, 2, 3, so that small ones leave high bits alone. The error of a vector
is that of `uniform` (its root mean square at most half a step); that of a single value has no bound of its own.

`uniform` counts steps of its grid from far below the mean, so that nearly all stored integers lie in 0..255. Their high
bytes are then all alike, and the low ones are coded by frequency; signed integers compress by a tenth to a third less.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from kpu.errors import CorruptError, MismatchError
from kpu.format.statistics import F32, Accumulator, Statistics, are_axes, find_axes, snap
from kpu.format.teacher import DEFAULT_STEP, CodecSpec

Packing = Literal["plain", "bytes", "bits", "gzip"]

LIMIT: Final = 32767  # the largest stored integer of `uniform`; -LIMIT the smallest, one below it is the fill
FOLDED_LIMIT: Final = LIMIT // 2  # the most steps from the centre along an axis of `rotated`
HUGE: Final = 2.0**60  # steps that are turned onto axes; there they saturate
MASKED: Final = -32768
MIDDLE: Final = 128  # what the mean of a channel is stored as
ZERO: Final = 16  # what a raw 0 is stored as, in every channel, where many values are 0
MANY_ZEROS: Final = 1 / 16  # of all values
_NEAR: Final = 1024  # steps between mean and 0 of a channel whose 0 is stored as ZERO, at most
BF16_NAN: Final = 0x7FC0

_DTYPES: Final = {"uniform": np.int16, "rotated": np.int16, "fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}
_FP16_MAX: Final = np.float32(65504.0)
_BF16_MAX: Final = np.uint32(0x7F7F0000).view(np.float32)


@dataclass(frozen=True)
class QuantGrid:
    """A codec with the static parameters of one output: `centre` and `scale` are float32[D], `offset` is int32[D].

    `centre` is the value stored as 0, `offset` what the centre of the statistics is stored as: the standardised value
    is `step * (stored - offset)`. Under `rotated` it is `step * (unfold(stored) @ axes)`, with an axis a row of `axes`,
    orthonormal float32[D, D], and no offset. Centre and offset are 0 and scale is 1 for the other codecs.
    """

    codec: CodecSpec
    centre: F32
    scale: F32
    offset: npt.NDArray[np.int32]
    axes: F32 | None = None

    @cached_property
    def middle(self) -> F32:
        """The centre of the statistics, float32[D]: a whole number of scales, as `snap` gives it."""
        if self.codec.name != "uniform":
            return self.centre
        steps: F32 = np.rint(self.centre / self.scale) + self.offset.astype(np.float32)
        return steps * self.scale

    @property
    def dtype(self) -> "np.dtype[Any]":
        """Of the stored values; `bf16` is stored as the bits of its numbers, in uint16."""
        return np.dtype(_DTYPES[self.codec.name])

    @property
    def fill(self) -> int | float:
        """What a masked row and padding hold; it decodes to NaN."""
        return MASKED if self.on_grid else BF16_NAN if self.codec.name == "bf16" else float("nan")

    @property
    def on_grid(self) -> bool:
        """Whether integers are stored, counted in steps."""
        return self.codec.step is not None

    @property
    def limit(self) -> int:
        """How far from 0 the steps on a grid may be."""
        return LIMIT if self.axes is None else FOLDED_LIMIT

    @property
    def packing(self) -> Packing:
        """Of chunks: integers are compressed, floating-point noise is not worth it."""
        if not self.on_grid:
            return "plain"
        return "bits" if self.codec.name == "rotated" else "bytes"

    def encode(self, features: F32) -> npt.NDArray[Any]:
        """Stored values of float32[..., D], of the same shape.

        All round half to even. `uniform` clips to -32767..32767, `rotated` to 16383 steps either way, `fp16` and `bf16`
        to their finite range. NaN becomes the fill, under `rotated` in the whole vector.
        """
        name = self.codec.name
        if name == "fp32":
            return features.astype(np.float32, copy=False)
        if name == "fp16":
            return np.clip(features, -_FP16_MAX, _FP16_MAX).astype(np.float16)
        if name == "bf16":
            return _to_bf16(np.clip(features, -_BF16_MAX, _BF16_MAX))
        steps = self._steps(features)
        missing = np.isnan(steps)
        np.clip(steps, -self.limit, self.limit, out=steps)
        steps[missing] = 0
        stored = steps.astype(np.int16)
        if self.axes is not None:
            stored = fold(stored)
        stored[missing] = MASKED
        return stored

    def saturated(self, features: F32) -> npt.NDArray[np.bool_]:
        """Which values `encode` clips; of the shape of `features`."""
        name = self.codec.name
        if self.on_grid:
            return np.abs(self._steps(features)) > self.limit
        if name == "fp32":
            return np.zeros(features.shape, np.bool_)
        return np.abs(features) > (_FP16_MAX if name == "fp16" else _BF16_MAX)

    def decode(self, stored: npt.NDArray[Any]) -> F32:
        """float32 values of what `encode` gave, of the same shape; the fill becomes NaN."""
        if self.codec.name == "bf16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        if not self.on_grid:
            return stored.astype(np.float32)
        masked = stored == MASKED
        values = self.steps(stored).astype(np.float32)
        if self.axes is not None:
            values = values @ self.axes
        values *= self.scale
        values += self.centre
        if masked.any():
            values[masked] = np.nan
        return values

    def steps(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What integers of a grid count, of their shape: two that mean nearly the same differ by one at most."""
        return stored if self.axes is None else unfold(stored)

    def attributes(self, grid: tuple[int, int] | None) -> dict[str, Any]:
        """The array's attribute `kpu`. `grid` is (H, W) of a map's tokens, None for vectors.

        Axes are the base64 of little-endian float32, row after row.
        """
        attributes = {
            "codec": self.codec.name,
            "step": self.codec.step,
            "centre": self.centre.astype(np.float64).tolist(),
            "scale": self.scale.astype(np.float64).tolist(),
            "offset": self.offset.tolist(),
            "grid": None if grid is None else list(grid),
        }
        if self.axes is not None:
            attributes["axes"] = base64.b64encode(self.axes.astype("<f4").tobytes()).decode()
        return attributes

    @staticmethod
    def from_attributes(attributes: Mapping[str, Any], file: str) -> "tuple[QuantGrid, tuple[int, int] | None]":
        """Grid and (H, W) from an array's attribute `kpu`; `file` is named in errors.

        Raises:
            CorruptError: it is not what `attributes` gives.
        """
        try:
            codec = CodecSpec(name=attributes["codec"], step=attributes["step"])
            centre = np.array(attributes["centre"], dtype=np.float32)
            scale = np.array(attributes["scale"], dtype=np.float32)
            offset = np.array(attributes["offset"], dtype=np.int32)
            tokens = attributes["grid"]
            grid = None if tokens is None else (int(tokens[0]), int(tokens[1]))
            axes = None
            if codec.name == "rotated":
                raw = np.frombuffer(base64.b64decode(attributes["axes"], validate=True), "<f4")
                axes = raw.astype(np.float32).reshape(len(centre), len(centre))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError):
            expected = "codec, step, centre, scale, offset and grid of a teacher's output (axes, if rotated)"
            raise CorruptError(file, f"attribute kpu: expected {expected}, found {repr(attributes)[:200]}") from None
        finite = np.isfinite(centre).all() and np.isfinite(scale).all()
        if centre.ndim != 1 or not centre.shape == scale.shape == offset.shape or not finite or not (scale > 0).all():
            raise CorruptError(file, "attribute kpu: expected finite centres, as many positive scales and offsets")
        if axes is not None and not are_axes(axes, len(centre)):
            raise CorruptError(file, "attribute kpu: expected orthonormal axes")
        return QuantGrid(codec, centre, scale, offset, axes), grid

    def _steps(self, features: F32) -> F32:
        steps: F32 = features - self.middle
        steps /= self.scale
        if self.axes is not None:  # bounded, for infinity times 0 is not a number
            steps = np.clip(steps, -HUGE, HUGE) @ self.axes.T
        np.rint(steps, out=steps)
        steps += self.offset.astype(np.float32)
        return steps


def calibrated(moments: Accumulator, codec: CodecSpec) -> Statistics:
    """The statistics of an output, with all that `codec` needs of them.

    Raises:
        SourceError: no vector was merged.
    """
    return for_codec(moments.finish(DEFAULT_STEP), codec)


def for_codec(statistics: Statistics, codec: CodecSpec) -> Statistics:
    """The same moments with the centre on the grid of `codec`, and with axes if it needs them."""
    if codec.step is None:
        return statistics
    centre, _ = snap(statistics.mean, statistics.std, codec.step)
    axes = find_axes(statistics) if codec.name == "rotated" else statistics.axes
    return replace(statistics, centre=centre.astype(np.float64), axes=axes)


def make_grid(codec: CodecSpec, statistics: Statistics) -> QuantGrid:
    """The grid that `codec` stores an output with these statistics on.

    Raises:
        MismatchError: the statistics' centre was snapped to the grid of another step, or they lack axes.
    """
    if codec.step is None:
        channels = len(statistics.mean)
        return QuantGrid(
            codec, np.zeros(channels, np.float32), np.ones(channels, np.float32), np.zeros(channels, np.int32)
        )
    centre, scale = snap(statistics.mean, statistics.std, codec.step)
    if not np.array_equal(centre, statistics.centre):
        raise MismatchError(
            f"codec.step: the calibration's centres do not lie on a grid of step {codec.step}: they were made for "
            "another step; use that one, or calibrate anew in another cache"
        )
    if codec.name == "rotated":
        if statistics.axes is None:
            raise MismatchError(
                "codec.name: expected a calibration with axes for rotated, found one that was made for another codec; "
                "use that one, or calibrate anew in another cache"
            )
        return QuantGrid(codec, centre, scale, np.zeros(len(centre), np.int32), statistics.axes)
    steps = np.rint(centre / scale)
    offset = np.full(len(centre), MIDDLE, np.int32)
    if statistics.zeros >= MANY_ZEROS:
        near = np.abs(steps) <= _NEAR
        offset[near] = steps[near].astype(np.int32) + ZERO
    return QuantGrid(codec, (steps - offset.astype(np.float32)) * scale, scale, offset)


def fold(steps: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """0, -1, 1, -2 to 0, 1, 2, 3, of steps up to FOLDED_LIMIT either way."""
    return (steps << 1) ^ (steps >> 15)


def unfold(stored: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """0, 1, 2, 3 to 0, -1, 1, -2; the fill becomes anything."""
    return (stored >> 1) ^ -(stored & 1)


def _to_bf16(values: F32) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), np.uint16(BF16_NAN), rounded.astype(np.uint16))
