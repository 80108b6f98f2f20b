"""A small cache, made through the same calls as an extraction makes it, with features that are known.

20 rows in 3 units, the last one of 4 rows. Row 5 is masked for everybody (its image is truncated), row 13 for teacher
`alpha` alone (it gave NaN). `alpha` has a head, a vector and a map; `beta` a vector and the map of a layer.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from kpu.commit.plan import publish_plan
from kpu.commit.teacher import publish_teacher
from kpu.commit.unit import EncodedOutput, UnitFeatures
from kpu.commit.writer import CacheWriter
from kpu.format.codecs import calibrated
from kpu.format.commits import ImageStatus, UnitRecord
from kpu.format.fidelity import RowFidelity, measure
from kpu.format.plan import Plan, SourceSpec
from kpu.format.statistics import Accumulator, Statistics
from kpu.format.teacher import CodecSpec, InputSpec, OutputSpec, TeacherSpec
from kpu.records.images import UnitImages
from kpu.records.samples import Samples, sample_schema, split_parts
from kpu.records.teachers import PublishedTeacher
from kpu.storage.base import Storage
from kpu.storage.leases import lease
from kpu.storage.open import open_storage

UNIT_ROWS, ROWS, UNITS = 8, 20, 3
MASKED_ROW, NONFINITE_ROW = 5, 13
OUTPUTS = {
    "alpha": (OutputSpec(name="global", shape=(8,)), OutputSpec(name="patch", shape=(4, 6), grid=(2, 2))),
    "beta": (OutputSpec(name="global", shape=(16,)), OutputSpec(name="layer6.patch", shape=(9, 3), grid=(3, 3))),
}


@dataclass(frozen=True)
class SmallCache:
    """Where the cache lies, and what must come out of it."""

    path: Path  # or a URL, where it was built under one
    plan: Plan
    teachers: dict[str, PublishedTeacher]

    @property
    def storage(self) -> Storage:
        return open_storage(self.path)


def key_of(row: int) -> str:
    return f"class {row % 3}/\N{LATIN SMALL LETTER E WITH ACUTE}-{row:04d}.png"


def sample_table(rows: int = ROWS, first: int = 0) -> pa.Table:
    numbers = np.arange(first, first + rows)
    keys = [key_of(row) for row in numbers]
    columns = {
        "key": pa.array(keys),
        "view": pa.array(np.zeros(rows, np.int32)),
        "file": pa.array(keys),
        "label": pa.array(numbers % 3, mask=numbers % 7 == 6),
        "draws": pa.nulls(rows, pa.list_(pa.float64())),
    }
    return pa.table(columns, schema=sample_schema("folder"))


def make_plan(
    storage: Storage, run: str, table: pa.Table | None = None, unit_rows: int = UNIT_ROWS, *, root: str = "/images"
) -> Plan:
    build = partial(
        Plan,
        source=SourceSpec(kind="folder", root=root),
        classes=("a", "b", "c"),
        views=1,
        seed=0,
        unit_rows=unit_rows,
        threads=1,
    )
    tables = iter([sample_table() if table is None else table])
    return publish_plan(storage, split_parts(tables, unit_rows), build, run, unit_rows=unit_rows)


def teacher_spec(name: str, /, codec: str | CodecSpec = "uniform", **changes: object) -> TeacherSpec:
    values = {
        "name": name,
        "model": f"torch:examples/{name}.py:make",
        "weights": None,
        "weights_digest": "1d" * 16,
        "input": InputSpec(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)),
        "precision": "fp32",
        "outputs": OUTPUTS.get(name, OUTPUTS["beta"]),
        "has_head": name == "alpha",
        "codec": CodecSpec(name=codec) if isinstance(codec, str) else codec,
    }
    return TeacherSpec.model_validate(values | changes)


def features_of(teacher: str, output: OutputSpec, rows: int = ROWS) -> np.ndarray:
    """What the teacher emits, float32 [rows, ...]: channels of very different scale, half of the values zero."""
    rng = np.random.default_rng([ord(letter) for letter in f"{teacher}/{output.name}"])
    values = rng.standard_normal((rows, *output.shape)) * np.geomspace(0.01, 100, output.channels)
    features = np.maximum(values, 0).astype(np.float32)
    if teacher == "alpha":
        features[NONFINITE_ROW, ..., 0] = np.nan
    return features


def image_status(rows: int = ROWS) -> np.ndarray:
    status = np.zeros(rows, np.uint8)
    status[MASKED_ROW] = ImageStatus.TRUNCATED
    return status


def unit_images(unit: int) -> UnitImages:
    rows = np.arange(unit * UNIT_ROWS, min((unit + 1) * UNIT_ROWS, ROWS))
    digest = np.random.default_rng(7).integers(0, 256, (ROWS, 16), np.uint8)[rows]
    return UnitImages(digest, image_status()[rows], np.stack([rows + 10, rows + 20], 1).astype(np.int32))


def statistics_of(spec: TeacherSpec) -> dict[str, Statistics]:
    found = {}
    for output in spec.outputs:
        features = features_of(spec.name, output)
        usable = np.isfinite(features).all(axis=tuple(range(1, features.ndim))) & (image_status() == 0)
        accumulator = Accumulator(output.channels)
        accumulator.update(features[usable].reshape(-1, output.channels))
        found[output.name] = calibrated(accumulator, spec.codec)
    return found


def head_of(spec: TeacherSpec) -> tuple[np.ndarray, np.ndarray] | None:
    if not spec.has_head:
        return None
    rng = np.random.default_rng(3)
    return rng.standard_normal((5, 8)).astype(np.float32), np.zeros(5, np.float32)


def make_teacher(storage: Storage, plan: Plan, spec: TeacherSpec, run: str) -> PublishedTeacher:
    return publish_teacher(storage, plan, spec, statistics_of(spec), head_of(spec), run)


@dataclass(frozen=True)
class MadeFeatures(UnitFeatures):
    """The features of one unit, encoded; measured again from `features_of`."""

    teacher: PublishedTeacher
    unit: int

    def measure(self, output: str, stored: np.ndarray) -> RowFidelity:
        (spec,) = (spec for spec in self.teacher.spec.outputs if spec.name == output)
        features = features_of(self.teacher.spec.name, spec)[self.unit * UNIT_ROWS :][: len(stored)]
        grid = self.teacher.grids[output]
        return measure(features, grid.decode(stored), grid.saturated(features), self.teacher.statistics[output])


def encode_unit(teacher: PublishedTeacher, unit: int, shift: float = 0.0) -> MadeFeatures:
    """One unit of a teacher; `shift` in channel standard deviations is added to its features."""
    rows = slice(unit * UNIT_ROWS, min((unit + 1) * UNIT_ROWS, ROWS))
    encoded, finite = {}, np.ones(rows.stop - rows.start, bool)
    for output in teacher.spec.outputs:
        statistics, grid = teacher.statistics[output.name], teacher.grids[output.name]
        features = features_of(teacher.spec.name, output)[rows]
        features = (features + shift * statistics.std).astype(np.float32)
        finite &= np.isfinite(features).all(axis=tuple(range(1, features.ndim)))
        stored = grid.encode(features)
        fidelity = measure(features, grid.decode(stored), grid.saturated(features), statistics)
        encoded[output.name] = EncodedOutput(stored, fidelity)
    return MadeFeatures(encoded, finite, teacher, unit)


def commit_unit(
    storage: Storage, plan: Plan, teacher: PublishedTeacher, unit: int, run: str, shift: float = 0.0
) -> UnitRecord:
    transaction = CacheWriter(storage, plan, run).unit(unit, Samples(storage, plan).unit(unit))
    transaction.images(unit_images(unit))
    return transaction.teacher(teacher, encode_unit(teacher, unit, shift))


def build(
    path: Path | str, *, codec: str = "uniform", run: str = "run", arm: tuple[str, str] | None = None
) -> SmallCache:
    """Make the cache, or complete what stands; `arm` is a stage (plan, teacher or unit) and a failpoint armed in it.

    `codec` is its name, or `<name> in tars`.
    """
    storage = open_storage(path, create=True)
    codec, _, tars = codec.partition(" in ")
    shards = "webdataset" if tars else "zarr"

    def stage(name: str) -> None:
        if arm and arm[0] == name:
            os.environ["KPU_FAILPOINT"] = arm[1]

    with lease(storage, run):
        stage("plan")
        plan = make_plan(storage, run)
        stage("teacher")
        teachers = {
            name: make_teacher(storage, plan, teacher_spec(name, codec, format=shards), run) for name in OUTPUTS
        }
        stage("unit")
        for unit in range(plan.units):
            for teacher in teachers.values():
                commit_unit(storage, plan, teacher, unit, run)
    return SmallCache(path, plan, teachers)


class Hooked:
    """A storage that calls `hook` once, before it publishes or quarantines `key`: another driver at that moment."""

    def __init__(self, storage: Storage, method: str, key: str, hook: Callable[[], object]) -> None:
        self._storage, self._moment, self._hook = storage, (method, key), hook

    def __getattr__(self, name: str) -> object:
        return getattr(self._storage, name)

    def publish(self, key: str, data: bytes, *, run: str) -> bool:
        self._pass("publish", key)
        return self._storage.publish(key, data, run=run)

    def quarantine(self, key: str, *, run: str) -> None:
        self._pass("quarantine", key)
        self._storage.quarantine(key, run=run)

    def _pass(self, method: str, key: str) -> None:
        if (method, key) == self._moment:
            self._moment = ("", "")
            self._hook()


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a cache but temporaries, by its path inside."""
    return {file: (path / file).read_bytes() for file in sorted(_files(path))}


def _files(path: Path) -> Iterator[str]:
    for file in path.rglob("*"):
        inside = file.relative_to(path)
        if file.is_file() and inside.parts[0] != ".tmp":
            yield inside.as_posix()
