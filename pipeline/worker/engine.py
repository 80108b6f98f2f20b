"""The computing half of a worker: frozen teachers on one device, fed with batches of pixels.

Every method must run on one and the same thread: results on the CPU are bit-identical only at equal thread counts,
and torch keeps the count per thread.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from threading import Event

import numpy as np
import pyarrow as pa
import torch

from kpu.errors import NonFiniteError
from kpu.format.codecs import QuantGrid
from kpu.format.commits import ImageStatus
from kpu.format.plan import Decoding
from kpu.format.statistics import Accumulator, Statistics
from kpu.pixels.resize import geometry
from kpu.sources import SourceReader
from pipeline.config import ExtractConfig
from pipeline.run.reports import Stopwatch
from pipeline.teachers import ShippedTeacher, load_shipped
from pipeline.teachers.base import FrozenTeacher
from pipeline.worker.device import Device
from pipeline.worker.loading import Batch, ImageLoader
from pipeline.worker.moments import moments
from pipeline.worker.quantise import DeviceGrid
from pipeline.worker.unit_buffer import Computed, UnitBuffer, new_images

DECODE_AHEAD_OF_GPU = 2


class Interrupted(KeyboardInterrupt):
    """The run was stopped between two batches."""


class Engine:
    """Teachers, a device, and the loader that feeds them."""

    def __init__(
        self,
        config: ExtractConfig,
        teachers: Mapping[str, ShippedTeacher],
        reader: SourceReader,
        decoding: Decoding,
        *,
        device: str,
        threads: int,
        pool: Executor,
    ) -> None:
        self._batch_size = config.executor.batch_size
        self._device = Device(device, threads)
        # On the CPU decoding ahead would only compete with the teachers for the same cores.
        ahead = DECODE_AHEAD_OF_GPU if self._device.is_cuda else 0
        self._loader = ImageLoader(reader, pool, threads, ahead, config.crop, decoding)
        self.stopping = Event()
        self.seen = np.zeros(0, np.uint8)
        self.teachers: dict[str, FrozenTeacher] = {
            name: load_shipped(name, shipped, device=device, seed=config.seed) for name, shipped in teachers.items()
        }

    def device_grids(
        self, grids: Mapping[str, QuantGrid], statistics: Mapping[str, Statistics]
    ) -> dict[str, DeviceGrid]:
        """Quantisation parameters of a teacher's outputs, on the device."""
        return {output: DeviceGrid(grid, statistics[output], self._device.name) for output, grid in grids.items()}

    def batches(self, table: pa.Table, names: Sequence[str], watch: Stopwatch) -> Iterator[Batch]:
        """The rows of the sample table `table` as pixels for the named teachers."""
        geometries = list(dict.fromkeys(geometry(self.teachers[name].input) for name in names))
        for batch in self._loader.batches(table, self._batch_size, geometries, watch):
            if self.stopping.is_set():
                raise Interrupted
            yield batch

    def forward(self, name: str, batch: Batch) -> dict[str, torch.Tensor]:
        """Features of one batch by output: float32 [B, D] or [B, T, D] on the device."""
        teacher = self.teachers[name]
        return teacher(self._device.upload(batch.pixels[geometry(teacher.input)]))

    def accumulate(
        self, table: pa.Table, names: Sequence[str], done: Callable[[int], None] = lambda _: None
    ) -> dict[str, dict[str, Accumulator]]:
        """Moments of every output over the rows of `table`, without masked rows and those with NaN or infinity.

        `done` is told, after each batch, of how many rows so far. `seen` then has the status of each row.
        """
        totals = {
            name: {output.name: Accumulator(output.channels) for output in self.teachers[name].outputs}
            for name in names
        }
        seen = [np.zeros(0, np.uint8)]
        for batch in self.batches(table, names, Stopwatch()):
            seen.append(batch.status)
            usable = torch.from_numpy(np.flatnonzero(batch.status == ImageStatus.OK))
            for name in names:
                for output, features in self.forward(name, batch).items():
                    kept = features[usable.to(features.device)]
                    kept = kept[kept.isfinite().flatten(1).all(1)]
                    if len(kept):
                        totals[name][output].add(*moments(kept))
            done(batch.start + len(batch))
        self.seen = np.concatenate(seen)
        return totals

    def compute(
        self, table: pa.Table, names: Sequence[str], grids: Mapping[str, Mapping[str, DeviceGrid]], watch: Stopwatch
    ) -> Computed:
        """Quantised features of the rows of `table`, in host memory."""
        collectors = {
            name: UnitBuffer(self._device, self.teachers[name].outputs, grids[name], table.num_rows) for name in names
        }
        images = new_images(table.num_rows)
        for batch in self.batches(table, names, watch):
            rows = slice(batch.start, batch.start + len(batch))
            images.digest[rows], images.status[rows], images.size[rows] = batch.digest, batch.status, batch.size
            for name, collector in collectors.items():
                with watch("forward"):
                    features = self.forward(name, batch)
                with watch("quantise"):
                    collector.add(rows, features)
        with watch("forward"):  # on a GPU the work was only queued so far
            self._device.synchronize()
        return Computed(images, {name: collector.finish() for name, collector in collectors.items()})


def nonfinite_error(teacher: str, key: str) -> NonFiniteError:
    return NonFiniteError(
        f"teacher {teacher!r} emits NaN or infinity for {key!r}, expected finite features; use precision fp32 for this "
        "teacher, or set allow_nonfinite: true to mask such rows for it"
    )
