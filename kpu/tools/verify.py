"""Verify a cache: read every file that should exist, and compare it with what was committed."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import numpy as np

from kpu.errors import CorruptError
from kpu.format.codecs import QuantGrid
from kpu.format.commits import ImagesRecord, ImageStatus, ShardRecord
from kpu.format.plan import Plan
from kpu.records.plan import check_image_arrays, image_layouts, not_a_cache, read_plan
from kpu.records.samples import Samples, row_digest
from kpu.records.teachers import TeacherManifest, load_teacher, output_layout, read_teacher, teacher_folders
from kpu.records.units import (
    Mask,
    committed_units,
    load_images_record,
    load_record,
    mask_digest,
    nonfinite_rows,
    open_committed,
    record_problems,
)
from kpu.shards.layout import ArrayLayout
from kpu.shards.reader import ShardReader
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.storage.open import open_storage
from kpu.tools.report import NOT_COMMITTED, Problem, ReportBuilder, VerifyReport
from kpu.tools.strays import foreign_beside_shard, foreign_files

__all__ = ["Problem", "VerifyReport", "verify"]

_THREADS: Final = 4


def verify(
    cache: str | os.PathLike[str] | Storage,
    *,
    threads: int = _THREADS,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Read a whole cache and report all that is not as it was committed, is not committed, or does not belong.

    `progress(done, units)` is called from time to time. Damage never ends the check early; damage to the plan alone
    hides the rest, because the plan says what should exist.

    Raises:
        NotACacheError: there is no cache, or one of another format version.
    """
    storage = open_storage(cache) if isinstance(cache, str | os.PathLike) else cache
    report = ReportBuilder(storage)
    try:
        plan = read_plan(storage)
    except CorruptError as error:
        report.add(error.file, error.reason)
        return report.finish()
    if plan is None:
        if storage.size(paths.ROOT) is None:
            raise not_a_cache(storage.url)
        report.add(paths.PLAN, "is missing: without it nothing says what should exist")
        return report.finish()
    report.count(storage.size(paths.PLAN) or 0)
    metadata = {file: report.check_file(file, expected) for file, expected in plan.metadata.items()}
    read = {file: raw for file, raw in metadata.items() if raw is not None}
    if len(read) == len(metadata):
        report.attempt(paths.PLAN, partial(check_image_arrays, plan, read))
    teachers = _check_teachers(report, plan)
    units = _Units(report, plan, {name: teacher for name, teacher in teachers.items() if teacher})
    with ThreadPoolExecutor(threads, thread_name_prefix="kpu-verify") as pool:
        for numbers, digests in _row_digests(report, plan, units.any_committed):
            list(pool.map(units.check, digests, digests.values()))
            units.note_absent(numbers)
            if progress:
                progress(numbers.stop, plan.units)
    for file in foreign_files(storage, plan, teachers):
        report.add_foreign(file)
    return report.finish()


def _check_teachers(report: ReportBuilder, plan: Plan) -> dict[str, TeacherManifest | None]:
    """Every teacher that a run began, its files checked; None if nothing says what they should be."""
    teachers: dict[str, TeacherManifest | None] = {}
    for name in teacher_folders(report.storage):
        folder = paths.teacher(name)
        teacher = report.attempt(paths.group(folder), partial(read_teacher, report.storage, name), teacher=name)
        teachers[name] = teacher
        if teacher is None:
            continue
        found = [report.check_file(f"{folder}/{file}", sum_, teacher=name) for file, sum_ in teacher.files.items()]
        if None not in found:  # what they say must fit together, too
            report.attempt(paths.group(folder), partial(load_teacher, report.storage, plan, name), teacher=name)
    if not teachers:
        report.add(paths.TEACHERS, "there is no teacher: nothing has been extracted")
    return teachers


def _row_digests(report: ReportBuilder, plan: Plan, wanted: Mask) -> Iterator[tuple[range, dict[int, str | None]]]:
    """For each part of the sample table its units and, of the `wanted` ones, the row digest, None if damaged."""
    samples = Samples(report.storage, plan, cached_parts=1)
    for part in range(samples.parts):
        first = part * paths.UNITS_PER_PART
        units = range(first, min(first + paths.UNITS_PER_PART, plan.units))
        file = paths.samples_part(part)
        table = report.attempt(file, partial(samples.part, part))
        if table is not None:
            report.count(report.storage.size(file) or 0)
        chosen = [unit for unit in units if wanted[unit]]
        yield units, {unit: None if table is None else row_digest(samples.unit(unit)) for unit in chosen}


class _Units:
    """Checks one unit of the images and of every teacher, from several threads."""

    def __init__(self, report: ReportBuilder, plan: Plan, teachers: dict[str, TeacherManifest]) -> None:
        self._report, self._storage, self._plan, self._teachers = report, report.storage, plan, teachers
        self._images = image_layouts(plan.rows, plan.unit_rows)
        none = np.empty(0, np.float32)
        self._outputs = {
            name: {
                output.name: output_layout(
                    plan, teacher.spec, output, QuantGrid(teacher.spec.codec, none, none, none.astype(np.int32))
                )
                for output in teacher.spec.outputs
            }
            for name, teacher in teachers.items()
        }
        folders: dict[str | None, str] = {None: paths.IMAGES, **{name: paths.teacher(name) for name in teachers}}
        self._committed = {name: committed_units(self._storage, folder, plan.units) for name, folder in folders.items()}
        self.any_committed: Mask = np.logical_or.reduce(list(self._committed.values()))
        """Units that are committed of the images or of a teacher, as listed when the check began, bool [units]."""

    def note_absent(self, units: range) -> None:
        """Report those of `units` of which nothing is committed."""
        for unit in units:
            if not self.any_committed[unit]:
                for name in self._committed:
                    file = paths.commit(paths.IMAGES if name is None else paths.teacher(name), unit)
                    self._report.add(file, NOT_COMMITTED, unit=unit, teacher=name, kind="absent")

    def check(self, unit: int, rows: str | None) -> None:
        """`rows` is the row digest by the sample table, None if that is damaged."""
        images = self._check_images(unit, rows)
        for name in self._teachers:
            self._check_teacher(unit, name, rows or (images.row_digest if images else None), images)

    def _check_images(self, unit: int, rows: str | None) -> ImagesRecord | None:
        file = paths.commit(paths.IMAGES, unit)
        record = self._report.attempt(file, lambda: self._images_record(unit, file), unit=unit)
        if record is None:
            return None
        self._report.count(self._storage.size(file) or 0)
        if rows not in (None, record.row_digest):
            self._report.add(file, f"is of other rows: expected digest {rows}, found {record.row_digest}", unit=unit)
        for name, array in self._images.items():
            reader = self._check_shard(f"{paths.IMAGES}/{name}", array, record.arrays[name], unit, None)
            if reader is not None and name == "status":
                status = np.empty(reader.rows, np.uint8)
                reader.read(np.arange(reader.rows), status)
                if mask_digest(status != ImageStatus.OK) != record.masked_digest:
                    self._report.add(file, "masks other rows than images/status", unit=unit)
        return record

    def _images_record(self, unit: int, file: str) -> ImagesRecord | None:
        record = load_images_record(self._storage, self._plan, unit)
        if record is None:
            self._report.add(file, NOT_COMMITTED, unit=unit, kind="absent")
        return record

    def _check_teacher(self, unit: int, name: str, rows: str | None, images: ImagesRecord | None) -> None:
        file = paths.commit(paths.teacher(name), unit)

        def note(reason: str) -> None:
            self._report.add(file, reason, unit=unit, teacher=name)

        record = self._report.attempt(
            file, lambda: load_record(self._storage, self._plan, name, unit), unit=unit, teacher=name
        )
        if record is None:
            return
        self._report.count(self._storage.size(file) or 0)
        for problem in record_problems(record, self._teachers[name]):
            note(problem)
        if rows not in (None, record.row_digest):
            note(f"is of other rows: expected digest {rows}, found {record.row_digest}")
        if images and (record.masked, record.masked_digest) != (images.masked, images.masked_digest):
            note(f"masks other rows than {paths.commit(paths.IMAGES, unit)}: {record.masked}, not {images.masked}")
        count = len(self._plan.unit_range(unit))
        self._report.attempt(file, lambda: nonfinite_rows(record, file, count), unit=unit, teacher=name)
        for output, array in self._outputs[name].items():
            if output in record.outputs:
                self._check_shard(f"{paths.teacher(name)}/{output}", array, record.outputs[output], unit, name)

    def _check_shard(
        self, folder: str, array: ArrayLayout, record: ShardRecord, unit: int, teacher: str | None
    ) -> ShardReader | None:
        for foreign in foreign_beside_shard(self._storage, folder, unit, array):
            self._report.add_foreign(foreign, unit=unit, teacher=teacher)
        key = array.key(folder, unit)

        def check() -> ShardReader:
            reader = open_committed(self._storage, key, array, record, unit=unit, teacher=teacher)
            reader.verify()
            return reader

        reader = self._report.attempt(key, check, unit=unit, teacher=teacher)
        if reader is not None:
            self._report.count(record.bytes)
        return reader
