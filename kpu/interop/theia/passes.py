"""The two passes of an import over the features: one for statistics, one to encode and commit."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kpu.commit.agreement import agree
from kpu.commit.teacher import existing_statistics
from kpu.commit.unit import EncodedOutput, UnitFeatures
from kpu.commit.writer import CacheWriter
from kpu.errors import MismatchError, SourceError
from kpu.format.codecs import calibrated
from kpu.format.commits import ImageStatus
from kpu.format.fidelity import RowFidelity, measure
from kpu.format.plan import Decoding, Plan
from kpu.format.statistics import Accumulator, Statistics
from kpu.format.teacher import TeacherSpec
from kpu.interop.theia.columns import ColumnEntry, Dataset, FeatureReader
from kpu.pixels.decode import Decoded
from kpu.reading.cache import Cache
from kpu.records.images import UnitImages, load_status
from kpu.records.samples import Samples
from kpu.records.teachers import PublishedTeacher, teacher_names
from kpu.records.units import committed_units
from kpu.sources import source_reader
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.util.digests import DIGEST_BYTES, digest_bytes

_BATCH: Final = 64  # samples that one thread has in hand
_AT_ONCE: Final = 8 * _BATCH
Progress = Callable[[int, int], None]


class Passes:
    """What an import does once its plan is published. Not safe to use from several threads."""

    def __init__(
        self, storage: Storage, plan: Plan, found: Dataset, run: str, pool: ThreadPoolExecutor, progress: Progress
    ) -> None:
        self._storage, self._plan, self._dataset, self._pool = storage, plan, found, pool
        self._writer = CacheWriter(storage, plan, run, pool=pool)
        self._samples = Samples(storage, plan)
        self._images = source_reader(plan.source)
        self._progress = progress
        self._done, self._total = 0, 2 * plan.rows * len(found.models)

    def teacher(self, spec: TeacherSpec, reader: FeatureReader) -> PublishedTeacher:
        """Publish a teacher with statistics of its features in all rows that have an image, unless it is published."""
        statistics: dict[str, Statistics] = {}
        before = self._done
        if spec.name not in teacher_names(self._storage):
            statistics = existing_statistics(self._storage, spec) or self._statistics(spec, reader)
        self._advance(before + self._plan.rows - self._done)
        return self._writer.teacher(spec, statistics, None)

    def units(self, teachers: dict[str, PublishedTeacher], readers: dict[str, FeatureReader]) -> tuple[int, int]:
        """Commit pending units; return how many units of teachers were committed, and how many rows are masked.

        Raises:
            MismatchError: a committed unit was made from other features than its tars hold now.
        """
        streams = {name: self._dataset.entries(reader.model) for name, reader in readers.items()}
        there = {name: committed_units(self._storage, paths.teacher(name), self._plan.units) for name in teachers}
        cache = Cache(self._storage, self._plan)
        committed = masked = 0
        for unit in range(self._plan.units):
            table = self._samples.unit(unit)
            valid = self._commit_images(unit, table)
            masked += int(np.count_nonzero(~valid))
            for name, teacher in teachers.items():
                entries = list(islice(streams[name], table.num_rows))
                self._check_keys(table, entries, readers[name].model)
                if there[name][unit]:
                    self._check_features(cache, unit, teacher, readers[name], entries, valid)
                else:
                    self._commit(unit, table, teacher, readers[name], entries)
                    committed += 1
                self._advance(table.num_rows)
        return committed, masked

    def _statistics(self, spec: TeacherSpec, reader: FeatureReader) -> dict[str, Statistics]:
        totals = {output.name: Accumulator(output.channels) for output in spec.outputs}
        stream = self._dataset.entries(reader.model)
        for unit in range(self._plan.units):
            table = self._samples.unit(unit)
            valid = self._commit_images(unit, table)
            for start in range(0, table.num_rows, _AT_ONCE):
                batch = list(islice(stream, min(_AT_ONCE, table.num_rows - start)))
                places = range(start, start + len(batch), _BATCH)
                for place, features in zip(places, self._pool.map(reader.read, _cut(batch)), strict=True):
                    for name, total in totals.items():
                        usable = features[name][valid[place : place + _BATCH]]
                        total.update(usable.reshape(-1, usable.shape[-1]))
                self._advance(len(batch))
        return {name: calibrated(total, spec.codec) for name, total in totals.items()}

    def _commit_images(self, unit: int, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Commit what decoding finds in a unit, unless that is done; which of its rows have an image, bool [n]."""
        status = load_status(self._storage, self._plan, unit)
        if status is None:
            rows = table.num_rows
            images = UnitImages(
                np.zeros((rows, DIGEST_BYTES), np.uint8), np.zeros(rows, np.uint8), np.zeros((rows, 2), np.int32)
            )
            look = partial(_look, how=self._plan.source.decoding)
            for start in range(0, rows, _AT_ONCE):
                encoded = self._images.read(table.slice(start, _AT_ONCE))
                for row, (data, image) in enumerate(zip(encoded, self._pool.map(look, encoded), strict=True), start):
                    images.digest[row] = np.frombuffer(digest_bytes(data), np.uint8)
                    if isinstance(image, ImageStatus):
                        images.status[row] = image
                    else:
                        images.size[row] = image
            status = self._writer.unit(unit, table).images(images).status
        return np.equal(status, ImageStatus.OK)

    def _check_keys(self, table: pa.Table, entries: Sequence[ColumnEntry], model: str) -> None:
        """The column must be what it was when it was checked against the images."""
        pairs = zip(table["key"].to_pylist(), table["file"].to_pylist(), strict=True)
        expected = [key.removeprefix(f"{tar.removesuffix('.tar')}/") for key, tar in pairs]
        if expected != [entry.key for entry in entries]:
            raise SourceError(
                f"{self._dataset.files.name(model)}: expected the samples that were found at first, found others: its "
                "tars changed meanwhile; import it again once nobody writes there"
            )

    def _check_features(
        self,
        cache: Cache,
        unit: int,
        teacher: PublishedTeacher,
        reader: FeatureReader,
        entries: Sequence[ColumnEntry],
        valid: npt.NDArray[np.bool_],
    ) -> None:
        """Hold a committed unit against the column, by its first valid row in each tar: keys outlive other features."""
        firsts = {entries[row].tar: row for row in np.flatnonzero(valid)[::-1].tolist()}
        name, rows = teacher.spec.name, sorted(firsts.values())
        start = self._plan.unit_range(unit).start
        if not rows:
            return
        for output, features in reader.read([entries[row] for row in rows]).items():
            grid = teacher.grids[output]
            existing = cache.read_encoded(name, output, [start + row for row in rows]).values
            stored = grid.encode(features)
            for place, row in enumerate(rows):
                one = slice(place, place + 1)
                if agree(teacher, output, existing[one], stored[one], valid[row : row + 1]):
                    continue
                expected, found = grid.decode(existing[one]).ravel(), features[place].ravel()
                worst = int(np.abs(expected - found).argmax())
                raise MismatchError(
                    f"{self._dataset.place(reader.model, entries[row])}: expected the features that were imported as "
                    f"row {start + row} of {name}/{output}, found others (value {worst}: {expected[worst]:.6g} became "
                    f"{found[worst]:.6g}): the column was made anew; restore its tars, or import into another place"
                )

    def _commit(
        self,
        unit: int,
        table: pa.Table,
        teacher: PublishedTeacher,
        reader: FeatureReader,
        entries: Sequence[ColumnEntry],
    ) -> None:
        """Encode and publish one unit of one teacher."""
        outputs = {
            output.name: EncodedOutput(
                np.empty((len(entries), *output.shape), teacher.grids[output.name].dtype), _no_fidelity(len(entries))
            )
            for output in teacher.spec.outputs
        }

        def encode(start: int) -> None:
            rows = slice(start, start + _BATCH)
            for name, features in reader.read(entries[rows]).items():
                stored = outputs[name].stored[rows] = teacher.grids[name].encode(features)
                _measure(teacher, name, features, stored, outputs[name].rows, rows)

        for _ in self._pool.map(encode, range(0, len(entries), _BATCH)):
            pass
        features = _Imported(outputs, np.ones(len(entries), bool), teacher, reader, entries)
        self._writer.unit(unit, table).teacher(teacher, features)

    def _advance(self, samples: int) -> None:
        self._done += samples
        self._progress(min(self._done, self._total), self._total)


@dataclass(frozen=True)
class _Imported(UnitFeatures):
    """Features of a unit, read again where they are measured again."""

    teacher: PublishedTeacher
    reader: FeatureReader
    entries: Sequence[ColumnEntry]

    def measure(self, output: str, stored: npt.NDArray[Any]) -> RowFidelity:
        found = _no_fidelity(len(self.entries))
        for start in range(0, len(self.entries), _BATCH):
            rows = slice(start, start + _BATCH)
            features = self.reader.read(self.entries[rows])[output]
            _measure(self.teacher, output, features, stored[rows], found, rows)
        return found


def _cut(entries: Sequence[ColumnEntry]) -> list[Sequence[ColumnEntry]]:
    return [entries[start : start + _BATCH] for start in range(0, len(entries), _BATCH)]


def _look(data: bytes, how: Decoding) -> ImageStatus | tuple[int, int]:
    """(H, W) of an image, or why there is none."""
    with Decoded(data, how) as image:
        return image if isinstance(image, ImageStatus) else (image.height, image.width)


def _no_fidelity(rows: int) -> RowFidelity:
    return RowFidelity(np.zeros(rows), np.zeros(rows), np.zeros(rows, np.int64))


def _measure(
    teacher: PublishedTeacher,
    name: str,
    features: npt.NDArray[np.float32],
    stored: npt.NDArray[Any],
    into: RowFidelity,
    rows: slice,
) -> None:
    grid = teacher.grids[name]
    part = measure(features, grid.decode(stored), grid.saturated(features), teacher.statistics[name])
    into.squared_error[rows], into.cosine[rows], into.saturated[rows] = part.squared_error, part.cosine, part.saturated
