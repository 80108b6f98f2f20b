"""Quantisation where the features are, with what it cost in each row.

On the CPU the stored values are bit-equal to those of `kpu.format.codecs.QuantGrid.encode` (under `rotated` except for
some halfway between two steps), and the costs agree with `kpu.format.fidelity.measure` to about seven digits. A
rotation changes neither lengths nor angles, so under `rotated` they are measured on the axes.

Letters: B rows, T tokens (1 for vectors), N = B * T, D channels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kpu.format.codecs import HUGE, MASKED, QuantGrid
from kpu.format.statistics import Statistics

_DTYPES = {
    "uniform": torch.int16,
    "rotated": torch.int16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.uint16,
}
_FLOAT_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Below this many values torch stays on the calling thread and the temporaries in its core's cache. Waking the other
# threads for each of these short operations costs more than it gains, and far more while they decode or compress.
_SERIAL_VALUES = 2**15 - 1
# Adding and taking away 1.5 * 2**23 rounds float32 below 2**22 half to even; torch.round wakes all threads.
_ROUNDING = 1.5 * 2**23


@dataclass(frozen=True)
class Quantised:
    """A batch as stored, on the device.

    `stored` is of the features' shape. Per row: `squared_error` float64 [B], the mean of ((decoded - x) / std)^2;
    `cosine` float64 [B], the mean over tokens, of standardised vectors; `saturated` int64 [B], values out of range;
    `finite` bool [B], False if the features hold NaN or infinity (the row's costs mean nothing then).
    """

    stored: Tensor
    squared_error: Tensor
    cosine: Tensor
    saturated: Tensor
    finite: Tensor


class DeviceGrid:
    """A grid on a device; `dtype` is torch's for the stored values. One thread at a time may use it."""

    def __init__(self, grid: QuantGrid, statistics: Statistics, device: str | torch.device) -> None:
        self.dtype = _DTYPES[grid.codec.name]
        self._device = torch.device(device)
        self._codec = grid.codec.name
        self._axes_DD = None if grid.axes is None else self._tensor(grid.axes)
        self._wide_axes_DD: Tensor | None = None
        if self._axes_DD is not None and self._device.type == "cpu":
            self._wide_axes_DD = self._axes_DD.double()
        # Errors are measured on (x - centre) / unit: in steps where there is a grid, else in standard deviations.
        self._on_grid, self._limit = grid.on_grid, grid.limit
        self._offset = self._tensor(grid.offset)
        self._short_offset = self._offset.to(torch.int16)
        self._centre = self._tensor(grid.middle if self._on_grid else statistics.centre)
        self._unit = self._tensor(grid.scale if self._on_grid else statistics.std)
        self._deviations = grid.codec.step or 1.0  # standard deviations in one unit
        self._usual = self._longest_usual()
        self._scratch = torch.empty(3, _SERIAL_VALUES)

    def encode(self, features: Tensor, stored: Tensor | None = None) -> Quantised:
        """Quantise contiguous float32 [B, D] or [B, T, D] on this device; into `stored`, of that shape, if given.

        `features` is left as it is. On a GPU nothing waits: copy the results and synchronise before reading them.
        """
        rows, tokens, channels = len(features), math.prod(features.shape[1:-1]), features.shape[-1]
        if stored is None:
            stored = torch.empty(features.shape, dtype=self.dtype, device=self._device)
        with torch.inference_mode():
            x_ND, stored_ND = features.view(-1, channels), stored.view(-1, channels)
            if self._device.type == "cpu":
                error_N, cosine_N, saturated_N, finite_N = self._encode_blocks(x_ND, stored_ND)
            else:  # to look for what is unusual would mean to wait
                error_N, cosine_N, saturated_N, finite_N = self._encode_any(x_ND, stored_ND, torch.float32)
            return Quantised(
                stored,
                squared_error=error_N.view(rows, tokens).mean(1) / channels * self._deviations**2,
                cosine=cosine_N.view(rows, tokens).mean(1),
                saturated=saturated_N.view(rows, tokens).sum(1),
                finite=finite_N.view(rows, tokens).all(1),
            )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(self._device)

    def _longest_usual(self) -> float:
        """Tokens whose standardised vector is shorter hold no value that is out of range: none exceeds the length."""
        if self._on_grid:
            return self._limit - float(self._offset.abs().max())
        room = torch.finfo(_FLOAT_TYPES[self._codec]).max - float(self._centre.abs().max())
        return 0.99 * room / max(float(self._unit.max()), 1.0)

    def _encode_blocks(self, x_ND: Tensor, stored_ND: Tensor) -> tuple[Tensor, ...]:
        """Fill `stored_ND`; return what `_encode_any` does, which has to look at few tokens."""
        count, channels = x_ND.shape
        lengths_3N = torch.empty((3, count), dtype=torch.float64)
        block = max(1, _SERIAL_VALUES // channels)
        if self._scratch.shape[1] < block * channels:
            self._scratch = torch.empty(3, block * channels)
        for at in range(0, count, block):
            part = slice(at, at + block)
            self._encode_plain(x_ND[part], stored_ND[part], lengths_3N[:, part])
        costs = (
            lengths_3N[2].square(),
            _cosine(*lengths_3N),
            torch.zeros(count, dtype=torch.int64),
            torch.ones(count, dtype=torch.bool),
        )
        kind = _FLOAT_TYPES.get(self._codec, torch.int16)  # torch does not scatter uint16
        places = (~(lengths_3N[0] < self._usual)).nonzero().flatten()
        for unusual in places.split(block) if len(places) else ():
            part_ND = torch.empty((len(unusual), channels), dtype=self.dtype)
            for cost_N, value in zip(costs, self._encode_any(x_ND[unusual], part_ND, torch.float64), strict=True):
                cost_N[unusual] = value
            stored_ND.view(kind)[unusual] = part_ND.view(kind)
        return costs

    def _encode_plain(self, x_ND: Tensor, stored_ND: Tensor, lengths_3N: Tensor) -> None:
        """Encode values that are finite and within range, in few passes over little memory.

        `lengths_3N`: of the standardised vectors, of what is decoded from them, and of the difference.
        """
        u_ND, v_ND, w_ND = (each[: x_ND.numel()].view_as(x_ND) for each in self._scratch)
        torch.sub(x_ND, self._centre, out=u_ND)
        u_ND.div_(self._unit)
        if self._axes_DD is not None:
            u_ND = torch.mm(u_ND, self._axes_DD.T, out=w_ND)
        lengths_3N[0] = torch.linalg.vector_norm(u_ND, dim=1)
        if self._on_grid:
            torch.add(u_ND, _ROUNDING, out=v_ND).sub_(_ROUNDING)
            stored_ND.copy_(v_ND)
            if self._axes_DD is None:
                stored_ND.add_(self._short_offset)
            else:
                _fold(stored_ND)
        elif self._codec == "fp32":
            stored_ND.copy_(x_ND)
            lengths_3N[1] = lengths_3N[0]
            lengths_3N[2] = 0
            return
        else:
            target = stored_ND.view(_FLOAT_TYPES[self._codec])
            target.copy_(x_ND)
            v_ND.copy_(target).sub_(self._centre).div_(self._unit)
        lengths_3N[1] = torch.linalg.vector_norm(v_ND, dim=1)
        lengths_3N[2] = torch.linalg.vector_norm(u_ND.sub_(v_ND), dim=1)

    def _encode_any(self, x_ND: Tensor, stored_ND: Tensor, wide: torch.dtype) -> tuple[Tensor, ...]:
        """Fill `stored_ND`, whatever the values are, and measure in precision `wide`.

        Returns, for each token: squared length of the error float64, cosine float64, values out of range int64, and
        whether it is finite.
        """
        u_ND = self._units(x_ND, wide)
        if self._on_grid:
            steps_ND = u_ND.round() if wide == torch.float32 else self._units(x_ND, torch.float32).round()
            steps_ND += self._offset
            out_ND, missing_ND = steps_ND.abs() > self._limit, steps_ND.isnan()
            steps_ND.clamp_(-self._limit, self._limit).nan_to_num_(nan=0)
            stored_ND.copy_(steps_ND)
            if self._axes_DD is not None:
                _fold(stored_ND)
            stored_ND.masked_fill_(missing_ND, MASKED)
            v_ND = steps_ND.to(wide) - self._offset
        else:
            kind = _FLOAT_TYPES[self._codec]
            largest = torch.finfo(kind).max
            out_ND = x_ND.abs() > largest
            target = stored_ND.view(kind)
            if kind == torch.float32:
                target.copy_(x_ND)
                out_ND.zero_()  # infinity is stored as it is
            else:
                target.copy_(x_ND.clamp(-largest, largest))
                target.masked_fill_(x_ND.isnan(), float("nan"))  # NaN has many bit patterns: use one
            v_ND = (target.to(wide) - self._centre) / self._unit
        own_N, decoded_N, error_N = (_length(each) for each in (u_ND, v_ND, u_ND - v_ND))
        product_N = own_N * decoded_N
        cosine_N = (u_ND.mul_(v_ND).sum(1).double() / product_N).nan_to_num_(0, 0, 0).clamp_(-1, 1)
        cosine_N = torch.where(product_N == 0, _both_zero(own_N, decoded_N), cosine_N)
        return error_N.square(), cosine_N, out_ND.sum(1), x_ND.isfinite().all(1)

    def _units(self, x_ND: Tensor, wide: torch.dtype) -> Tensor:
        u_ND = (x_ND.to(wide) - self._centre) / self._unit
        if self._axes_DD is None:
            return u_ND
        if wide == torch.float32:
            u_ND.clamp_(-HUGE, HUGE)
        if self._wide_axes_DD is None:
            return u_ND @ self._axes_DD.T
        axes_DD = (self._axes_DD if wide == torch.float32 else self._wide_axes_DD).T
        return torch.cat([u_1D @ axes_DD for u_1D in u_ND.split(1)])  # the last bits depend on how many there are


def _fold(stored_ND: Tensor) -> None:
    """As `kpu.format.codecs.fold`, in place."""
    signs_ND = stored_ND >> 15
    stored_ND.bitwise_left_shift_(1).bitwise_xor_(signs_ND)


def _length(vectors_ND: Tensor) -> Tensor:
    """float64 [N], finite whatever comes."""
    length_N: Tensor = torch.linalg.vector_norm(vectors_ND, dim=1).nan_to_num_().double()
    return length_N


def _cosine(own_N: Tensor, decoded_N: Tensor, error_N: Tensor) -> Tensor:
    """Cosine of two vectors from their lengths and that of their difference, which is short.

    Written as its distance from 1, which float32 lengths do not blur.
    """
    product_N = own_N * decoded_N
    cosine_N = 1 + ((own_N - decoded_N).square() - error_N.square()) / (2 * product_N)
    return torch.where(product_N == 0, _both_zero(own_N, decoded_N), cosine_N)


def _both_zero(own_N: Tensor, decoded_N: Tensor) -> Tensor:
    """The cosine where a vector is zero: 1 if the other is too, else 0."""
    return ((own_N == 0) & (decoded_N == 0)).double()
