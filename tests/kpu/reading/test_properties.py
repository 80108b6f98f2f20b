"""Whole caches of any shape, unit, codec and format: what is read is within the bound, and damage is never read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpu import open_cache
from kpu.commit.teacher import publish_teacher
from kpu.commit.unit import EncodedOutput, UnitFeatures
from kpu.commit.writer import CacheWriter
from kpu.errors import CacheError
from kpu.format.codecs import calibrated
from kpu.format.commits import ImageStatus
from kpu.format.fidelity import RowFidelity, measure
from kpu.format.statistics import Accumulator
from kpu.format.teacher import CodecSpec, OutputSpec
from kpu.reading import tensorstore
from kpu.records.images import UnitImages
from kpu.records.samples import Samples
from kpu.storage.leases import lease
from kpu.storage.open import open_storage
from kpu.tools.verify import verify
from tests.support.builders import make_plan, sample_table, teacher_spec

ERRORS = {"uniform": 0.025, "rotated": 0.025, "fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""In standard deviations with a step of 0.05, of a value or under `rotated` of a vector; else relative."""
BOTH = pytest.mark.parametrize("fewest", [1, 10**6], ids=["tensorstore", "own"])


@dataclass(frozen=True)
class Made:
    """What a cache was made of: float32 `features` [rows, ...] and the `valid` rows."""

    codec: str
    shards: str
    unit_rows: int
    features: np.ndarray[Any, Any]
    valid: np.ndarray[Any, Any]

    @property
    def output(self) -> OutputSpec:
        shape = self.features.shape[1:]
        return OutputSpec(name="out", shape=shape, grid=None if len(shape) == 1 else (1, shape[0]))


@st.composite
def anything(draw: st.DrawFn) -> Made:
    rows = draw(st.integers(1, 40))
    item = draw(st.one_of(st.tuples(st.integers(1, 9)), st.tuples(st.integers(1, 5), st.integers(1, 9))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = np.exp(draw(st.floats(0, 4)) * rng.normal(size=item[-1]))
    features = (rng.standard_t(3, (rows, *item)) * spread + rng.normal(size=item[-1])).astype(np.float32)
    if draw(st.booleans()):
        features = np.maximum(features, 0)
    valid = np.array(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    valid[draw(st.integers(0, rows - 1))] = True
    return Made(
        draw(st.sampled_from(sorted(ERRORS))),
        draw(st.sampled_from(["zarr", "webdataset"])),
        draw(st.sampled_from([8, 16, 64])),
        features,
        valid,
    )


def write(path: Path, made: Made) -> None:
    """By the calls that an extraction makes."""
    storage, codec = open_storage(path, create=True), CodecSpec(name=made.codec)
    moments = Accumulator(made.output.channels)
    moments.update(made.features[made.valid].reshape(-1, made.output.channels))
    statistics = {"out": calibrated(moments, codec)}
    spec = teacher_spec("t", codec, outputs=(made.output,), has_head=False, format=made.shards)
    with lease(storage, "run"):
        plan = make_plan(storage, "run", sample_table(len(made.features)), made.unit_rows)
        teacher = publish_teacher(storage, plan, spec, statistics, None, "run")
        grid = teacher.grids["out"]
        for unit in range(plan.units):
            rows = np.asarray(plan.unit_range(unit))
            x, valid = made.features[rows], made.valid[rows]
            status = np.where(valid, ImageStatus.OK, ImageStatus.TRUNCATED).astype(np.uint8)
            images = UnitImages(np.zeros((len(rows), 16), np.uint8), status, np.ones((len(rows), 2), np.int32))
            transaction = CacheWriter(storage, plan, "run").unit(unit, Samples(storage, plan).unit(unit))
            transaction.images(images)
            stored = grid.encode(x)
            fidelity = measure(x, grid.decode(stored), grid.saturated(x), statistics["out"])
            outputs = {"out": EncodedOutput(stored, fidelity)}
            transaction.teacher(teacher, Unshared(outputs, np.ones(len(rows), bool)))


class Unshared(UnitFeatures):
    def measure(self, output: str, stored: Any) -> RowFidelity:
        raise AssertionError(f"{output}: nobody else writes here, found {len(stored)} rows")


@contextmanager
def written(made: Made, fewest: int) -> Iterator[Path]:
    """A cache of it; tensorstore reads where there are at least `fewest` cores."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorstore, "FEWEST_CORES", fewest)
        path = Path(folder) / "any.kpu"
        write(path, made)
        yield path


@BOTH
@settings(max_examples=25, deadline=None)
@given(anything(), st.data())
def test_any_rows_of_any_cache_are_within_the_bound(fewest: int, made: Made, data: st.DataObject) -> None:
    with written(made, fewest) as path:
        assert verify(path).ok
        cache = open_cache(path)
        assert np.array_equal(cache.valid(), made.valid)
        count = len(made.features)
        rows = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=2 * count), label="rows"), int)
        found = cache.read("t", "out", rows, masked="nan")
        assert found.shape == (len(rows), *made.features.shape[1:])
        assert np.isnan(found[~made.valid[rows]]).all()
        exact, found = (x[made.valid[rows]].astype(np.float64) for x in (made.features[rows], found))
        std = cache.teachers["t"].statistics["out"].std
        error = np.abs(found - exact)
        allowed = ERRORS[made.codec] * (std if made.codec in ("uniform", "rotated") else np.abs(exact))
        rounding = 2.0**-20 * (np.abs(exact) + np.abs(cache.teachers["t"].grid("out").middle) + std)
        if made.codec == "rotated":  # the bound is that of a vector
            error, allowed = (np.sqrt(np.mean(np.square(x / std), axis=-1)) for x in (error, allowed + rounding))
            rounding = 1e-4
        elif made.codec in ("fp16", "bf16"):
            rounding = 2.0**-24  # half a step of fp16's subnormal numbers
        assert (error <= allowed + rounding).all()


@BOTH
@settings(max_examples=25, deadline=None)
@given(anything(), st.data())
def test_a_changed_byte_is_reported_and_never_read(fewest: int, made: Made, data: st.DataObject) -> None:
    with written(made, fewest) as path:
        cache = open_cache(path)
        before = cache.read("t", "out", slice(None), masked="nan")
        files = sorted(file for file in (path / "teachers").rglob("*") if file.is_file())
        file = data.draw(st.sampled_from([file for file in files if file.parent != path / "teachers"]), label="file")
        raw = bytearray(file.read_bytes())
        raw[data.draw(st.integers(0, len(raw) - 1), label="at")] ^= data.draw(st.integers(1, 255), label="xor")
        file.write_bytes(raw)

        assert not verify(path).ok
        try:
            after = open_cache(path).read("t", "out", slice(None), masked="nan")
        except CacheError:
            return
        np.testing.assert_array_equal(after, before)  # the byte is needed for no row: of a tar's header
