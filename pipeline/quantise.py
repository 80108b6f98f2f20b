"""Quantisation where the features are, with what it cost in each row.

The stored values are bit-equal to those of `cache.codecs.Grid.encode`; the costs agree with `cache.fidelity.measure`
to some seven digits. Letters: B rows, T tokens (1 for vectors), N = B * T, D channels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache.codecs import LIMIT, MASKED, Grid
from cache.statistics import Statistics

_DTYPES = {"uniform": torch.int16, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.uint16}
_FLOAT_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
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
    `finite` bool [B], False where the features hold NaN or infinity (the row's costs mean nothing then).
    """

    stored: Tensor
    squared_error: Tensor
    cosine: Tensor
    saturated: Tensor
    finite: Tensor


class DeviceGrid:
    """A grid on a device; `dtype` is torch's for the stored values. One thread at a time may use it."""

    def __init__(self, grid: Grid, statistics: Statistics, device: str | torch.device) -> None:
        self.dtype = _DTYPES[grid.codec.name]
        self._device = torch.device(device)
        self._codec = grid.codec.name
        lossless = self._codec != "uniform"
        # Errors are measured on (x - centre) / unit: in grid steps for uniform, else in standard deviations.
        self._centre = self._tensor(statistics.centre if lossless else grid.centre)
        self._unit = self._tensor(statistics.std if lossless else grid.scale)
        self._deviations = 1.0 if lossless else float(grid.codec.step or 0)  # standard deviations in one unit
        self._usual = self._longest_usual()
        self._scratch = torch.empty(2, _SERIAL_VALUES)

    def encode(self, features: Tensor, stored: Tensor | None = None) -> Quantised:
        """Quantise contiguous float32 [B, D] or [B, T, D] on this device; into `stored`, of that shape, if given.

        `features` is left as it is. On a GPU nothing waits: copy the results and synchronise before reading them.
        """
        rows, channels = len(features), features.shape[-1]
        if stored is None:
            stored = torch.empty(features.shape, dtype=self.dtype, device=self._device)
        with torch.inference_mode():
            x_ND, stored_ND = features.view(-1, channels), stored.view(-1, channels)
            lengths_3N = torch.empty((3, len(x_ND)), device=self._device)
            if self._device.type == "cpu":
                saturated, finite = self._encode_blocks(x_ND, stored_ND, lengths_3N, rows)
            else:  # looking for what is unusual would mean to wait; treating every value as such costs less
                saturated_N, finite_N = self._encode_any(x_ND, stored_ND, lengths_3N)
                saturated, finite = saturated_N.view(rows, -1).sum(1), finite_N.view(rows, -1).all(1)
            own_BT, decoded_BT, error_BT = lengths_3N.double().view(3, rows, -1)
            error = error_BT.square().mean(1) / channels * self._deviations**2
            return Quantised(stored, error, _cosine(own_BT, decoded_BT, error_BT).mean(1), saturated, finite)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(self._device)

    def _encode_blocks(self, x_ND: Tensor, stored_ND: Tensor, lengths_3N: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Fill `stored_ND` and `lengths_3N`; saturated int64 [B] and finite bool [B]."""
        tokens, channels = len(x_ND) // max(rows, 1), x_ND.shape[1]
        block = max(1, _SERIAL_VALUES // channels)
        if self._scratch.shape[1] < block * channels:
            self._scratch = torch.empty(2, block * channels)
        for at in range(0, len(x_ND), block):
            x = x_ND[at : at + block]
            u, v = (each[: x.numel()].view_as(x) for each in self._scratch)
            self._encode_plain(x, stored_ND[at : at + block], lengths_3N[:, at : at + block], u, v)
        saturated = torch.zeros(rows, dtype=torch.int64)
        finite = torch.ones(rows, dtype=torch.bool)
        unusual = ~(lengths_3N[0] < self._usual).view(rows, -1).all(1)
        for row in unusual.nonzero().flatten().tolist():
            part = slice(row * tokens, (row + 1) * tokens)
            saturated_T, finite_T = self._encode_any(x_ND[part], stored_ND[part], lengths_3N[:, part])
            saturated[row], finite[row] = saturated_T.sum(), finite_T.all()
        return saturated, finite

    def _encode_plain(self, x_ND: Tensor, stored_ND: Tensor, lengths_3N: Tensor, u_ND: Tensor, v_ND: Tensor) -> None:
        """Encode values that are finite and within range; `u_ND` and `v_ND` are temporaries."""
        torch.sub(x_ND, self._centre, out=u_ND)
        u_ND.div_(self._unit)
        torch.linalg.vector_norm(u_ND, dim=1, out=lengths_3N[0])
        if self._codec == "uniform":
            torch.add(u_ND, _ROUNDING, out=v_ND).sub_(_ROUNDING)
            stored_ND.copy_(v_ND)
        elif self._codec == "fp32":
            stored_ND.copy_(x_ND)
            lengths_3N[1].copy_(lengths_3N[0])
            lengths_3N[2].zero_()
            return
        else:
            target = stored_ND.view(_FLOAT_TYPES[self._codec])
            target.copy_(x_ND)
            v_ND.copy_(target)
            v_ND.sub_(self._centre).div_(self._unit)
        torch.linalg.vector_norm(v_ND, dim=1, out=lengths_3N[1])
        torch.linalg.vector_norm(u_ND.sub_(v_ND), dim=1, out=lengths_3N[2])

    def _longest_usual(self) -> float:
        """Tokens whose standardised vector is shorter hold no value that is out of range: none exceeds the length."""
        if self._codec == "uniform":
            return LIMIT
        kind = _FLOAT_TYPES.get(self._codec, torch.float32)
        room = torch.finfo(kind).max - float(self._centre.abs().max())
        return 0.99 * room / max(float(self._unit.max()), 1.0)

    def _encode_any(self, x_ND: Tensor, stored_ND: Tensor, lengths_3N: Tensor) -> tuple[Tensor, Tensor]:
        """Encode whatever comes; saturated int64 [N] and finite bool [N]."""
        u_ND = (x_ND - self._centre) / self._unit
        if self._codec == "uniform":
            v_ND = u_ND.round()
            out_ND = v_ND.abs() > LIMIT
            v_ND.clamp_(-LIMIT, LIMIT).nan_to_num_(nan=MASKED)
            stored_ND.copy_(v_ND)
        elif self._codec == "fp32":
            stored_ND.copy_(x_ND)
            v_ND, out_ND = u_ND, torch.zeros_like(x_ND, dtype=torch.bool)
        else:
            kind = _FLOAT_TYPES[self._codec]
            largest = torch.finfo(kind).max
            out_ND = x_ND.abs() > largest
            target = stored_ND.view(kind)
            target.copy_(x_ND.clamp(-largest, largest))
            target.masked_fill_(x_ND.isnan(), float("nan"))  # NaN has many bit patterns: use one
            v_ND = (target.float() - self._centre) / self._unit
        for length_N, vectors_ND in zip(lengths_3N, (u_ND, v_ND, u_ND - v_ND), strict=True):
            torch.linalg.vector_norm(vectors_ND, dim=1, out=length_N)
        return out_ND.sum(1), x_ND.isfinite().all(1)


def _cosine(own_BT: Tensor, decoded_BT: Tensor, error_BT: Tensor) -> Tensor:
    """Cosine of two vectors from their lengths and that of their difference; 1 where both are 0, 0 where one is.

    Written as its distance from 1, which float32 lengths do not blur.
    """
    product = own_BT * decoded_BT
    cosine = 1 + ((own_BT - decoded_BT).square() - error_BT.square()) / (2 * product)
    return torch.where(product == 0, ((own_BT == 0) & (decoded_BT == 0)).double(), cosine)
