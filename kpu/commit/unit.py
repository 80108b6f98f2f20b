"""Commit one unit: its images first, then each teacher. Shards come first, their commit record last.

The record makes the unit part of the cache. Letters: n rows of the unit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kpu.commit.agreement import agree
from kpu.commit.images import ImageShard, compare_images
from kpu.commit.shards import ShardTransaction
from kpu.errors import CorruptError, MismatchError
from kpu.format.commits import ImagesRecord, ImageStatus, OutputRecord, ShardRecord, UnitRecord
from kpu.format.fidelity import RowFidelity, summarise
from kpu.format.plan import Plan
from kpu.format.teacher import OutputSpec
from kpu.records.images import UnitImages, array_shard, load_status
from kpu.records.plan import image_layouts
from kpu.records.samples import row_digest
from kpu.records.teachers import PublishedTeacher, output_shard
from kpu.records.units import Mask, load_images_record, load_unit, mask_digest, pack_mask, plan_digest, sealed_files
from kpu.shards.layout import ArrayLayout, Shard
from kpu.shards.writer import encode_shard
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.util.digests import seal_document
from kpu.util.failpoints import failpoint

Timer = Callable[[str], AbstractContextManager[None]]
"""Times a named stage."""


def untimed(_stage: str) -> AbstractContextManager[None]:
    """A timer that times nothing."""
    return nullcontext()


@dataclass(frozen=True)
class EncodedOutput:
    """One output of one unit: `stored` [n, ...] as the grid encodes it, and its fidelity by row."""

    stored: npt.NDArray[Any]
    rows: RowFidelity


@dataclass(frozen=True)
class UnitFeatures(ABC):
    """One teacher's features of a unit, encoded; `finite` bool [n] is False if an output holds NaN or infinity."""

    outputs: Mapping[str, EncodedOutput]
    finite: Mask

    @abstractmethod
    def measure(self, output: str, stored: npt.NDArray[Any]) -> RowFidelity:
        """The fidelity of `stored` [n, ...], which agrees with ours and which another worker published first."""


@dataclass(frozen=True)
class _OutputShard:
    """One output of one unit, to be published; accepts values within one step of the grid."""

    teacher: PublishedTeacher
    output: str
    unit: int
    stored: npt.NDArray[Any]
    valid: Mask
    pool: Executor | None
    timer: Timer

    @property
    def layout(self) -> ArrayLayout:
        return self.teacher.layouts[self.output]

    def encode(self) -> Shard:
        with self.timer("encode"):
            return encode_shard(self.stored, self.layout, self.unit, pool=self.pool)

    def accepts(self, values: npt.NDArray[Any]) -> bool:
        return agree(self.teacher, self.output, values, self.stored, self.valid)


class UnitTransaction:
    """One unit of a cache, to be committed: `images`, then `teacher` for each teacher."""

    def __init__(
        self,
        storage: Storage,
        plan: Plan,
        run: str,
        unit: int,
        table: pa.Table,
        *,
        pool: Executor | None = None,
        timer: Timer = untimed,
    ) -> None:
        self._storage, self._plan, self._run, self._unit = storage, plan, run, unit
        self._row_digest = row_digest(table)
        self._pool, self._timer = pool, timer
        self._masked: Mask | None = None  # rows without an image, bool [n], once they are known

    def images(self, images: UnitImages) -> UnitImages:
        """Commit what decoding found in the unit; or compare it with what is committed already, and return that.

        Raises:
            MismatchError: an image has other bytes, or decodes differently, than when it was committed.
            CorruptError: what is committed is damaged.
        """
        committed = self._commit_images(images)
        self._masked = committed.masked
        return committed

    def teacher(self, teacher: PublishedTeacher, features: UnitFeatures) -> UnitRecord:
        """Publish a teacher's shards of the unit, then its commit record; or return the record that exists already.

        Raises:
            MismatchError: the unit's images are not committed, or are of other rows.
            CorruptError: what is committed is damaged.
        """
        marker = paths.commit(paths.teacher(teacher.spec.name), self._unit)
        if self._storage.size(marker) is not None:
            return load_unit(self._storage, self._plan, teacher, self._unit)
        masked = self._load_mask() if self._masked is None else self._masked
        valid = ~masked & features.finite
        shards, records = self._shards(marker), dict[str, OutputRecord]()
        for output in teacher.spec.outputs:
            record = self._output(shards, teacher, output, features, valid)
            if record is None:
                return self._restored(shards, teacher, load_unit(self._storage, self._plan, teacher, self._unit))
            records[output.name] = record
        failpoint("unit.shards")
        unit_record = UnitRecord(
            unit=self._unit,
            plan=plan_digest(self._plan),
            row_digest=self._row_digest,
            teacher=teacher.spec.name,
            fingerprint=teacher.fingerprint,
            files=sealed_files(teacher),
            masked=int(np.count_nonzero(masked)),
            masked_digest=mask_digest(masked),
            nonfinite=pack_mask(~masked & ~features.finite),
            outputs=records,
        )
        if not self._storage.publish(marker, seal_document(unit_record.model_dump(mode="json")), run=self._run):
            unit_record = load_unit(self._storage, self._plan, teacher, self._unit)
        self._restored(shards, teacher, unit_record)
        failpoint("unit.committed")
        return unit_record

    def _commit_images(self, images: UnitImages) -> UnitImages:
        marker = paths.commit(paths.IMAGES, self._unit)
        if self._storage.size(marker) is not None:
            return self._compare(images)
        shards, records = self._shards(marker), dict[str, ShardRecord]()
        for name, layout in image_layouts(self._plan.rows, self._plan.unit_rows).items():
            values = getattr(images, name).astype(layout.dtype, copy=False)
            result = shards.publish(array_shard(name, self._unit, layout), ImageShard(values, layout, self._unit))
            if result is None:
                self._restore_images(shards)
                return self._compare(images)
            records[name] = result.record
        record = ImagesRecord(
            unit=self._unit,
            plan=plan_digest(self._plan),
            row_digest=self._row_digest,
            masked=int(np.count_nonzero(images.masked)),
            masked_digest=mask_digest(images.masked),
            arrays=records,
        )
        won = self._storage.publish(marker, seal_document(record.model_dump(mode="json")), run=self._run)
        self._restore_images(shards)
        failpoint("unit.images")
        return images if won else self._compare(images)

    def _shards(self, marker: str) -> ShardTransaction:
        return ShardTransaction(self._storage, self._unit, marker, self._run)

    def _output(
        self,
        shards: ShardTransaction,
        teacher: PublishedTeacher,
        output: OutputSpec,
        features: UnitFeatures,
        valid: Mask,
    ) -> OutputRecord | None:
        """Publish one output; None if the unit turns out to be committed with another shard."""
        ours = features.outputs[output.name]
        stored = ours.stored
        if not valid.all():
            stored = stored.copy()
            stored[~valid] = teacher.layouts[output.name].fill
        source = _OutputShard(teacher, output.name, self._unit, stored, valid, self._pool, self._timer)
        result = shards.publish(output_shard(teacher, output, self._unit), source)
        if result is None:
            return None
        rows = ours.rows if result.values is None else features.measure(output.name, result.values)
        fidelity = summarise(rows, valid, self._plan.unit_range(self._unit).start)
        return OutputRecord(bytes=result.record.bytes, seal=result.record.seal, fidelity=fidelity)

    def _compare(self, images: UnitImages) -> UnitImages:
        return compare_images(self._storage, self._plan, self._unit, images, self._row_digest)[1]

    def _restore_images(self, shards: ShardTransaction) -> None:
        record = self._images_record()
        if record is None:
            raise CorruptError(paths.commit(paths.IMAGES, self._unit), "vanished while it was read", unit=self._unit)
        layouts = image_layouts(self._plan.rows, self._plan.unit_rows)
        shards.restore({array_shard(name, self._unit, layouts[name]): shard for name, shard in record.arrays.items()})

    def _restored(self, shards: ShardTransaction, teacher: PublishedTeacher, record: UnitRecord) -> UnitRecord:
        outputs = {output.name: output for output in teacher.spec.outputs}
        shards.restore({output_shard(teacher, outputs[name], record.unit): out for name, out in record.outputs.items()})
        return record

    def _images_record(self) -> ImagesRecord | None:
        return load_images_record(self._storage, self._plan, self._unit)

    def _load_mask(self) -> Mask:
        """Rows without an image, bool [n], as committed; every teacher masks them."""
        record = self._images_record()
        marker = paths.commit(paths.IMAGES, self._unit)
        if record is None:
            raise MismatchError(f"unit {self._unit}: expected {marker}, found none; the images are committed first")
        if record.row_digest != self._row_digest:
            raise MismatchError(
                f"unit {self._unit}: expected the rows of {marker} ({record.row_digest}), found other rows "
                f"({self._row_digest})"
            )
        status = load_status(self._storage, self._plan, self._unit)
        if status is None:
            raise CorruptError(marker, "vanished while it was read", unit=self._unit)
        return np.not_equal(status, ImageStatus.OK)
