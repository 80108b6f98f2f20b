"""Per-channel statistics of a teacher's output: accumulated in float64, fixed by calibration, stored once.

Every moment is over the population (divided by the count). `centre` is the mean snapped to the grid that `uniform`
stores integers on, so that a raw 0 lies on that grid and stays exactly 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from kpu.errors import CorruptError, SourceError
from kpu.util.digests import canonical_json
from kpu.util.strict_json import parse_json, parse_json_object

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

DEAD_CHANNEL: Final = 1e-4  # the floor of a channel's std, as a part of the root mean square of all channels' stds
ALL_DEAD: Final = 1e-6  # the floor where no channel varies
_FIELDS: Final = ("count", "mean", "centre", "variance", "covariance", "zeros")
_AXES: Final = "axes"
_ORTHONORMAL: Final = 1e-3  # products of axes differ by no more from 0 and 1


@dataclass(frozen=True)
class Statistics:
    """Moments of one output over `count` vectors of D channels, unquantised.

    `mean`, `centre`, `variance`: float64[D]; `covariance`: float64[D, D], both divided by `count`. `zeros` is the share
    of all values that are exactly 0. `axes`, where a codec needs them, are those of `find_axes`, float32[D, D].
    """

    count: int
    mean: F64
    centre: F64
    variance: F64
    covariance: F64
    zeros: float = 0.0
    axes: F32 | None = None

    @cached_property
    def std(self) -> F64:
        """Standard deviation per channel, float64[D], with a floor for dead channels."""
        return floored_std(self.variance)


def floored_std(variance: F64) -> F64:
    """Square root of `variance`, at least DEAD_CHANNEL of its root mean square, or ALL_DEAD if that is 0."""
    floor = DEAD_CHANNEL * np.sqrt(np.mean(variance))
    return np.maximum(np.sqrt(variance), floor if floor > 0 else ALL_DEAD)


def find_axes(statistics: Statistics) -> F32:
    """The principal axes of standardised features, float32[D, D]: orthonormal rows, the largest variance first.

    They are the eigenvectors of the covariance divided by both standard deviations, each with its largest component
    above 0. Other machines may find others for the same statistics where variances are (nearly) equal.
    """
    _, vectors = np.linalg.eigh(statistics.covariance / np.outer(statistics.std, statistics.std))
    axes = vectors.T[::-1]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1, keepdims=True), axis=1)
    return np.ascontiguousarray(axes * np.sign(largest), dtype=np.float32)


def snap(mean: F64, std: F64, step: float) -> tuple[F32, F32]:
    """Centre and scale of a grid with `step` standard deviations between values, on which a raw 0 lies.

    In float32, `centre = k * scale` for an integer k near `mean / scale`; then a raw 0 is stored as -k, and
    `centre + scale * -k` is exactly 0.
    """
    scale = np.maximum(step * std, np.finfo(np.float32).tiny).astype(np.float32)
    steps = np.rint(mean / scale.astype(np.float64)).astype(np.float32)
    return steps * scale, scale


class Accumulator:
    """Running moments of vectors of D channels, merged pairwise (Chan, Golub, LeVeque 1983), in float64."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._zeros = 0
        self._mean: F64 = np.zeros(channels)
        self._comoment: F64 = np.zeros((channels, channels))

    def add(self, count: int, mean: F64, comoment: F64, zeros: int = 0) -> None:
        """Merge a batch: its count, its mean [D], its sum of outer products of deviations from that mean [D, D], and
        how many of its values are 0.
        """
        if not count:
            return
        self._zeros += zeros
        total = self.count + count
        delta = mean - self._mean
        self._mean += delta * (count / total)
        self._comoment += comoment
        self._comoment += np.outer(delta, delta * (self.count * (count / total)))
        self.count = total

    def update(self, x: npt.NDArray[np.floating[Any]]) -> None:
        """Merge the vectors x [N, D]."""
        if len(x):
            wide = x.astype(np.float64)
            mean = wide.mean(axis=0)
            wide -= mean
            self.add(len(wide), mean, wide.T @ wide, x.size - int(np.count_nonzero(x)))

    def finish(self, step: float) -> Statistics:
        """The statistics of all that was merged, with the centre on the grid of `step` standard deviations.

        Raises:
            SourceError: nothing was merged.
        """
        if not self.count:
            raise SourceError("calibration: expected at least one valid row, found none; look at the source's images")
        covariance = self._comoment / self.count
        covariance = (covariance + covariance.T) / 2
        variance = np.maximum(np.diagonal(covariance), 0.0)
        centre, _ = snap(self._mean, floored_std(variance), step)
        zeros = self._zeros / (self.count * len(variance))
        return Statistics(self.count, self._mean.copy(), centre.astype(np.float64), variance, covariance, zeros)


def dump_statistics(statistics: Mapping[str, Statistics], metadata: Mapping[str, str]) -> bytes:
    """Serialise as safetensors, tensors named `<output>.<field>`; equal input gives equal bytes."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    for output, stats in statistics.items():
        tensors |= {f"{output}.{field}": np.asarray(getattr(stats, field)) for field in _FIELDS}
        if stats.axes is not None:
            tensors[f"{output}.{_AXES}"] = stats.axes
    # One key only: safetensors writes several in no fixed order.
    return save(tensors, {"kpu": canonical_json(dict(metadata)).decode()})


def load_statistics(raw: bytes, file: str) -> tuple[dict[str, Statistics], dict[str, str]]:
    """Statistics by output, in alphabetical order, and the metadata that `dump_statistics` was given.

    Raises:
        CorruptError: not such a file, or a tensor is missing, of another shape or dtype, or not finite.
    """
    try:
        tensors = load(raw)
        header = parse_json(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        metadata: dict[str, str] = parse_json_object(header["__metadata__"]["kpu"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(file, f"is not a statistics file ({error})") from None
    outputs = sorted({name.rpartition(".")[0] for name in tensors})
    return {output: _take(tensors, output, file) for output in outputs}, metadata


def _take(tensors: Mapping[str, npt.NDArray[Any]], output: str, file: str) -> Statistics:
    try:
        count, mean, centre, variance, covariance, zeros = (tensors[f"{output}.{field}"] for field in _FIELDS)
    except KeyError as error:
        raise CorruptError(file, f"has no tensor {error}") from None
    channels = mean.size
    wanted = {"mean": mean, "centre": centre, "variance": variance, "covariance": covariance}
    for field, tensor in wanted.items():
        shape = (channels, channels) if field == "covariance" else (channels,)
        if tensor.dtype != np.float64 or tensor.shape != shape or not np.isfinite(tensor).all():
            found = f"{tensor.dtype}{list(tensor.shape)}"
            raise CorruptError(file, f"{output}.{field}: expected finite float64{list(shape)}, found {found}")
    if (variance < 0).any():
        raise CorruptError(file, f"{output}.variance: expected numbers from 0, found {variance.min()}")
    if count.shape or count.dtype != np.int64 or count < 1:
        raise CorruptError(file, f"{output}.count: expected one positive int64, found {count!r}")
    if zeros.shape or zeros.dtype != np.float64 or not 0 <= zeros <= 1:
        raise CorruptError(file, f"{output}.zeros: expected one float64 from 0 to 1, found {zeros!r}")
    axes = tensors.get(f"{output}.{_AXES}")
    if axes is not None and not are_axes(axes, channels):
        raise CorruptError(file, f"{output}.{_AXES}: expected orthonormal float32{[channels] * 2}, found others")
    return Statistics(int(count), mean, centre, variance, covariance, float(zeros), axes)


def same_statistics(one: Mapping[str, Statistics], other: Mapping[str, Statistics]) -> bool:
    """Whether all outputs are the same, and every value of their statistics."""

    def same(first: Statistics, second: Statistics) -> bool:
        return all(np.array_equal(getattr(first, each.name), getattr(second, each.name)) for each in fields(first))

    return one.keys() == other.keys() and all(same(one[output], other[output]) for output in one)


def are_axes(axes: npt.NDArray[Any], channels: int) -> bool:
    """Whether these are orthonormal rows, float32[D, D]."""
    if axes.dtype != np.float32 or axes.shape != (channels, channels):
        return False
    return bool(np.abs(axes @ axes.T - np.eye(channels, dtype=np.float32)).max() < _ORTHONORMAL)
