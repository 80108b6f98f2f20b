"""Gathering a unit's quantised features in host memory, batch by batch.

Letters: n rows of the unit, B of a batch, T tokens, D channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from kpu.commit.unit import EncodedOutput
from kpu.format.fidelity import RowFidelity
from kpu.format.teacher import OutputSpec
from kpu.records.images import UnitImages
from kpu.util.digests import DIGEST_BYTES
from pipeline.worker.device import Device
from pipeline.worker.quantise import DeviceGrid


@dataclass
class QuantisedFeatures:
    """One teacher's outputs for a unit; `finite` bool [n] is False if any output holds NaN or infinity."""

    outputs: dict[str, EncodedOutput]
    finite: np.ndarray


@dataclass
class Computed:
    """What the device thread hands over for a unit."""

    images: UnitImages
    teachers: dict[str, QuantisedFeatures]


def new_images(rows: int) -> UnitImages:
    return UnitImages(np.zeros((rows, DIGEST_BYTES), np.uint8), np.zeros(rows, np.uint8), np.zeros((rows, 2), np.int32))


class UnitBuffer:
    """Quantises one teacher's batches on the device and brings them to the host without waiting."""

    def __init__(
        self, device: Device, outputs: tuple[OutputSpec, ...], grids: Mapping[str, DeviceGrid], rows: int
    ) -> None:
        self._device = device
        self._grids = grids
        self._stored = {
            output.name: device.host_buffer((rows, *output.shape), grids[output.name].dtype) for output in outputs
        }
        # Columns: squared error, cosine, saturated, finite. float64 holds each of them exactly enough.
        self._rows = {output.name: device.host_buffer((rows, 4), torch.float64) for output in outputs}

    def add(self, rows: slice, features: Mapping[str, torch.Tensor]) -> None:
        """Take float32 [B, D] or [B, T, D] of every output for `rows` of the unit."""
        for name, stored in self._stored.items():
            direct = None if self._device.is_cuda else stored[rows]
            encoded = self._grids[name].encode(features[name], direct)
            if direct is None:
                self._device.download(encoded.stored, stored[rows])
            columns = [encoded.squared_error, encoded.cosine, encoded.saturated, encoded.finite]
            self._device.download(torch.stack([c.double() for c in columns], 1), self._rows[name][rows])

    def finish(self) -> QuantisedFeatures:
        """The whole unit; call `Device.synchronize` first."""
        outputs, finite = {}, None
        for name, stored in self._stored.items():
            columns = self._rows[name].numpy()
            fidelity = RowFidelity(columns[:, 0], columns[:, 1], columns[:, 2].astype(np.int64))
            outputs[name] = EncodedOutput(stored.numpy(), fidelity)
            fine = columns[:, 3] > 0
            finite = fine if finite is None else finite & fine
        assert finite is not None
        return QuantisedFeatures(outputs, finite)
