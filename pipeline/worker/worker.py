"""One worker: loads the frozen teachers once, then calibrates and extracts units. The same class serves every executor.

Computing happens on the worker's device thread, one unit after the other; encoding and writing on the calling thread,
beside the next unit's computing.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from socket import gethostname
from time import perf_counter
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch

from kpu.commit.teacher import list_differences
from kpu.commit.unit import UnitFeatures
from kpu.commit.writer import CacheWriter
from kpu.errors import CacheError, KpuError, SourceError, StorageError, TeacherError
from kpu.format.codecs import QuantGrid, calibrated, make_grid
from kpu.format.commits import UnitRecord
from kpu.format.fidelity import RowFidelity, measure
from kpu.format.plan import Plan, SourceSpec
from kpu.format.reasons import count_reasons, describe_reasons
from kpu.format.statistics import Accumulator, Statistics
from kpu.format.teacher import OutputSpec, TeacherSpec
from kpu.records.plan import load_plan
from kpu.records.samples import Samples
from kpu.records.teachers import PublishedTeacher, load_teacher
from kpu.sources import source_reader
from kpu.storage import paths
from kpu.storage.open import open_storage
from kpu.util.failpoints import failpoint
from pipeline.config import ExtractConfig
from pipeline.run.reports import Stopwatch, Task, UnitFailure, UnitReport
from pipeline.teachers import ShippedTeacher
from pipeline.teachers.backbone import reason
from pipeline.worker.device import choose_device
from pipeline.worker.engine import Engine, nonfinite_error
from pipeline.worker.measure import Measurement, encoded_sizes, measurement
from pipeline.worker.quantise import DeviceGrid
from pipeline.worker.unit_buffer import Computed

T = TypeVar("T")


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to begin; small and picklable. `source` may lie elsewhere than when it was planned."""

    config: ExtractConfig
    teachers: dict[str, ShippedTeacher]
    source: SourceSpec
    run: str


@dataclass(frozen=True)
class TeacherDescription:
    """A loaded teacher, as the driver needs to know it: `head` is (weight [C, D], bias [C]) in float32.

    `code` are the places, by digest, of code that the user named and that was run.
    """

    spec: TeacherSpec
    head: tuple[np.ndarray, np.ndarray] | None
    code: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Computed(UnitFeatures):
    """Features that were computed here; they are not kept, so measuring again computes them again."""

    worker: "Worker"
    teacher: str
    unit: int

    def measure(self, output: str, stored: np.ndarray) -> RowFidelity:
        return self.worker.remeasure(self.unit, self.teacher, output, stored)


class Worker:
    """Frozen teachers on one device, and the cache that they fill; `threads` is of the CPU."""

    def __init__(self, setup: WorkerSetup, threads: int) -> None:
        self._setup = setup
        self._config = setup.config
        self._device_thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="worker")
        self._engine = self._on_device(
            lambda: Engine(
                setup.config,
                setup.teachers,
                source_reader(setup.source),
                setup.source.decoding,
                device=choose_device(),
                threads=threads,
                pool=self._pool,
            )
        )
        self._calibrated = 0
        self._published: dict[str, PublishedTeacher] = {}
        self._grids: dict[str, dict[str, DeviceGrid]] = {}
        self._plan: Plan | None = None

    def _on_device(self, work: Callable[[], T]) -> T:
        try:
            return self._device_thread.submit(work).result()
        except torch.OutOfMemoryError as error:  # a forward pass says so itself, with its batch
            raise TeacherError(
                f"teachers {', '.join(self._config.teachers)}: they and a batch of {self._config.executor.batch_size} "
                "do not fit into the device's memory together; use a smaller executor.batch_size, more of the GPU for "
                f"each worker, or extract fewer teachers at a time ({reason(error)})"
            ) from error

    def stop(self) -> None:
        """Give up computing after the batch in hand; what is computed is still committed."""
        self._engine.stopping.set()

    def close(self) -> None:
        """Stop, and end the threads."""
        self.stop()
        self._device_thread.shutdown()
        self._pool.shutdown()

    def describe(self) -> list[TeacherDescription]:
        """Say what was loaded, in the order of the configuration."""
        return [
            TeacherDescription(
                teacher.spec(self._config.codec_of(name), self._config.format), teacher.head, teacher.code
            )
            for name, teacher in self._engine.teachers.items()
        ]

    def calibrate(self, names: Sequence[str], rows: np.ndarray) -> dict[str, dict[str, Statistics]]:
        """Statistics of every output of the named teachers over `rows` (int64), masked rows left out."""
        self._open()
        self._calibrated = 0
        table = self._samples.take(rows)
        totals = self._on_device(partial(self._engine.accumulate, table, names, self._note_calibrated))
        return {name: self._finish(name, outputs) for name, outputs in totals.items()}

    def progress(self) -> int:
        """How many rows the calibration that runs, in another thread, has seen."""
        return self._calibrated

    def _note_calibrated(self, rows: int) -> None:
        self._calibrated = rows

    def extract(self, task: Task) -> UnitReport:
        """Compute and commit one unit for those of the task's teachers that nobody has committed meanwhile.

        The report's task names these teachers; where there are none, nothing was done. A failure of one teacher, or of
        the source, is part of the report. Raises only what concerns the whole run: StorageError (a full disk, a lost
        mount), or an unexpected error.
        """
        rows = self._open().unit_range(task.unit)
        watch = Stopwatch()
        try:
            task = replace(task, teachers=tuple(name for name in task.teachers if not self._committed(name, task.unit)))
            if not task.teachers:
                return UnitReport(task, 0, 0, 0, watch.seconds)
            for name in task.teachers:
                self._prepare(name)
            table = self._samples.unit(task.unit)
            computed = self._on_device(partial(self._engine.compute, table, task.teachers, self._grids, watch))
            failpoint("unit.computed")
            return self._commit(task, table, computed, watch)
        except StorageError:
            raise
        except KpuError as error:
            failure = UnitFailure(task.unit, None, str(error))
            return UnitReport(task, len(rows), 0, 0, watch.seconds, (failure,))

    def features(self, names: Sequence[str], rows: np.ndarray) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
        """Image digests (uint8 [n, 16]) and float32 features of `rows` (int64 [n]) by teacher and output."""
        self._open()
        return self._on_device(partial(self._features, names, rows))

    def measure(self, table: pa.Table, warm_rows: int) -> Measurement:
        """Time the stages on the rows of `table` after its first `warm_rows`; needs no plan and writes nothing."""
        return self._on_device(partial(self._measure, table, warm_rows))

    def _open(self) -> Plan:
        """The plan, once the driver has published it; opens the sample table with it."""
        if self._plan is None:
            self._storage = open_storage(self._config.out)
            plan = load_plan(self._storage)
            if plan is None:
                raise CacheError(
                    f"{self._config.out}: expected plan.json, found none; was the cache removed meanwhile?"
                )
            self._samples = Samples(self._storage, plan)
            self._writer = CacheWriter(self._storage, plan, self._setup.run, pool=self._pool)
            self._plan = plan
        return self._plan

    def _finish(self, name: str, totals: dict[str, Accumulator]) -> dict[str, Statistics]:
        for output, total in totals.items():
            if not total.count:
                masked = describe_reasons(count_reasons(self._engine.seen))
                raise SourceError(
                    f"calibration of teacher {name!r}, output {output!r}: expected at least one usable row, found "
                    f"none among {len(self._engine.seen)}: {masked or 'each gives NaN or infinity'}"
                )
        codec = self._config.codec_of(name)
        return {output: calibrated(total, codec) for output, total in totals.items()}

    def _committed(self, name: str, unit: int) -> bool:
        return self._storage.size(paths.commit(paths.teacher(name), unit)) is not None

    def _prepare(self, name: str) -> None:
        """Read back how the teacher was calibrated, and hold what was loaded here against it."""
        if name in self._published:
            return
        published = load_teacher(self._storage, self._open(), name)
        here = self._engine.teachers[name].spec(self._config.codec_of(name), self._config.format)
        if differences := list_differences(published.spec, here):
            raise TeacherError(
                f"teacher {name!r} was loaded otherwise on {gethostname()} than the cache was begun with: "
                f"{'; '.join(differences)}; give every worker the same weights, packages and kind of device"
            )
        self._grids[name] = self._on_device(partial(self._engine.device_grids, published.grids, published.statistics))
        self._published[name] = published

    def _commit(self, task: Task, table: pa.Table, computed: Computed, watch: Stopwatch) -> UnitReport:
        transaction = self._writer.unit(task.unit, table, timer=watch)
        with watch("publish"):
            images = transaction.images(computed.images)
        valid = ~images.masked
        written, failures = 0, list[UnitFailure]()
        saturated, masked_alone = dict[str, tuple[int, int]](), dict[str, int]()
        for name in task.teachers:
            nonfinite = valid & ~computed.teachers[name].finite
            if nonfinite.any() and not self._config.allow_nonfinite:
                key = table["key"][int(np.flatnonzero(nonfinite)[0])].as_py()
                failures.append(UnitFailure(task.unit, name, str(nonfinite_error(name, key))))
                continue
            features = _Computed(computed.teachers[name].outputs, computed.teachers[name].finite, self, name, task.unit)
            with watch("publish"):
                record = transaction.teacher(self._published[name], features)
            written += sum(output.bytes for output in record.outputs.values())
            usable = int((valid & ~nonfinite).sum())
            saturated[name] = _saturated(record, usable, self._engine.teachers[name].outputs)
            masked_alone[name] = int(nonfinite.sum())
        reasons = count_reasons(images.status)
        return UnitReport(
            task,
            table.num_rows,
            sum(reasons.values()),
            written,
            watch.seconds,
            tuple(failures),
            saturated,
            masked_alone,
            reasons,
        )

    def remeasure(self, unit: int, name: str, output: str, stored: np.ndarray) -> RowFidelity:
        """The fidelity of `stored`, which another worker published, against this worker's features of the unit."""
        _, features = self.features([name], np.asarray(self._open().unit_range(unit)))
        grid, statistics = self._published[name].grids[output], self._published[name].statistics[output]
        mine = features[name][output]
        return measure(mine, grid.decode(stored), grid.saturated(mine), statistics)

    def _features(self, names: Sequence[str], rows: np.ndarray) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
        digests: list[np.ndarray] = []
        parts: dict[str, dict[str, list[np.ndarray]]] = {
            name: {output.name: [] for output in self._engine.teachers[name].outputs} for name in names
        }
        for batch in self._engine.batches(self._samples.take(rows), names, Stopwatch()):
            digests.append(batch.digest)
            for name in names:
                for output, features in self._engine.forward(name, batch).items():
                    parts[name][output].append(features.cpu().numpy())
        joined = {name: {o: np.concatenate(p) for o, p in outputs.items()} for name, outputs in parts.items()}
        return np.concatenate(digests), joined

    def _measure(self, table: pa.Table, warm_rows: int) -> Measurement:
        names = list(self._engine.teachers)
        warm = table.slice(0, warm_rows)
        timed = table.slice(warm_rows) if table.num_rows > warm_rows else warm
        grids: dict[str, dict[str, QuantGrid]] = {}
        device_grids = {}
        for name, totals in self._engine.accumulate(warm, names).items():
            statistics = self._finish(name, totals)
            codec = self._config.codec_of(name)
            grids[name] = {output: make_grid(codec, value) for output, value in statistics.items()}
            device_grids[name] = self._engine.device_grids(grids[name], statistics)
        watch, started = Stopwatch(), perf_counter()
        computed = self._engine.compute(timed, names, device_grids, watch)
        with watch("encode"):
            sizes = {
                name: encoded_sizes(
                    features, self._engine.teachers[name].outputs, grids[name], self._config.format, self._pool
                )
                for name, features in computed.teachers.items()
            }
        return measurement(timed.num_rows, started, watch, sizes)


def _saturated(record: UnitRecord, rows: int, outputs: Sequence[OutputSpec]) -> tuple[int, int]:
    """How many values of `rows` usable rows were beyond the range of the codec, and how many values they have."""
    count = sum(output.fidelity.saturated for output in record.outputs.values() if output.fidelity is not None)
    return count, rows * sum(output.tokens * output.channels for output in outputs)
