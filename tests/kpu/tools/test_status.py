import json
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from kpu import open_cache
from kpu.commit.plan import publish_plan
from kpu.errors import CorruptError, NotACacheError
from kpu.format.commits import ImageStatus
from kpu.format.plan import Plan, SourceSpec
from kpu.records.images import load_status
from kpu.records.samples import split_parts
from kpu.records.units import load_record
from kpu.storage.leases import lease
from kpu.storage.open import open_storage
from kpu.tools.status import status
from kpu.util.digests import seal_document
from tests.support.builders import (
    MASKED_ROW,
    NONFINITE_ROW,
    SmallCache,
    build,
    key_of,
    make_teacher,
    sample_table,
    teacher_spec,
)


def write_run(path: Path, name: str, **document: object) -> None:
    (path / "runs").mkdir(exist_ok=True)
    (path / f"runs/{name}.json").write_text(json.dumps({"id": name, "started": name, **document}))


def test_a_complete_cache(small_cache: SmallCache) -> None:
    found = status(small_cache.path)
    assert (found.complete, found.rows, found.units) == (True, 20, 3)
    assert set(found.teachers) == {"alpha", "beta"}
    for name, teacher in found.teachers.items():
        assert (teacher.committed_units, teacher.units) == (3, 3)
        shards = (small_cache.path / "teachers" / name).rglob("c/**/*")
        assert teacher.bytes == sum(file.stat().st_size for file in shards if file.is_file())
    assert found.failed == []


def test_masked_rows_are_listed_with_key_and_reason(small_cache: SmallCache) -> None:
    assert status(small_cache.path).as_json()["masked"] == [
        {"key": key_of(MASKED_ROW), "row": MASKED_ROW, "reason": "truncated"},
        {"key": key_of(NONFINITE_ROW), "row": NONFINITE_ROW, "reason": "NaN or infinity from teacher alpha"},
    ]


def test_masked_rows_of_several_units_are_looked_up_at_once_in_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = np.zeros(20, np.uint8)
    codes[[5, 9, 18]] = ImageStatus.TRUNCATED
    monkeypatch.setattr("tests.support.builders.image_status", lambda: codes)
    path = build(f"memory://{tmp_path}/a.kpu").path
    together = threading.Barrier(3)

    def load(*arguments: object) -> object:
        together.wait(timeout=20)
        return load_status(*arguments)

    monkeypatch.setattr("kpu.tools.status.load_status", load)
    masked = [(row.row, row.key) for row in status(path).masked if row.reason == "truncated"]
    assert masked == [(row, key_of(row)) for row in (5, 9, 18)]


def test_precision_is_pooled_over_units_rows_and_outputs(small_cache: SmallCache) -> None:
    squares = cosines = 0.0
    for unit, rows in enumerate((7, 8, 4)):
        outputs = load_record(small_cache.storage, small_cache.plan, "beta", unit).outputs
        vector, patch = outputs["global"].fidelity, outputs["layer6.patch"].fidelity
        squares += rows * (16 * vector.rmse**2 + 27 * patch.rmse**2)
        cosines += rows * (vector.cosine + 9 * patch.cosine)
    found = status(small_cache.path).teachers["beta"]
    assert found.rmse == pytest.approx(np.sqrt(squares / (19 * 43)), rel=1e-5)
    assert found.cosine == pytest.approx(cosines / (19 * 10), rel=1e-5)
    assert found.rmse < 0.0145


def test_units_that_are_not_committed_make_it_incomplete(small_cache: SmallCache) -> None:
    (small_cache.path / "teachers/alpha/commits/000001.json").unlink()
    found = status(small_cache.path)
    assert not found.complete
    assert [teacher.committed_units for teacher in found.teachers.values()] == [2, 3]


def test_a_teacher_without_units_counts(small_cache: SmallCache) -> None:
    shutil.rmtree(small_cache.path / "teachers/alpha/commits")
    (small_cache.path / "teachers/alpha/zarr.json").unlink()
    write_run(small_cache.path, "1", config={"teachers": {"beta": {}, "gamma": {}}})
    found = status(small_cache.path)
    assert not found.complete
    for name in ("alpha", "gamma"):
        teacher = found.teachers[name]
        assert (teacher.committed_units, teacher.units, teacher.bytes, teacher.rmse) == (0, 3, 0, None)


def test_failures_are_listed_until_the_unit_is_committed(small_cache: SmallCache) -> None:
    record = small_cache.path / "teachers/alpha/commits/000001.json"
    raw = record.read_bytes()
    record.unlink()
    config = {"teachers": {"alpha": {}, "beta": {}}}
    nan, gone = ({"teacher": teacher, "unit": 1, "reason": why} for teacher, why in (("alpha", "NaN"), (None, "gone")))
    beta = {"teacher": "beta", "unit": 1, "reason": "committed since"}
    write_run(small_cache.path, "1", failed=[{**nan, "reason": "an older reason"}, gone, beta], config=config)
    write_run(small_cache.path, "2", failed=[nan], config=config)
    assert status(small_cache.path).as_json()["failed"] == [gone, nan]
    record.write_bytes(raw)
    assert status(small_cache.path).failed == []


def test_a_cache_that_is_only_planned_or_begun(tmp_path: Path) -> None:
    with pytest.raises(NotACacheError, match="found an empty folder"):
        status(tmp_path)
    write_run(tmp_path, "1")
    assert status(tmp_path).as_json() == {
        "complete": False, "rows": 0, "units": 0, "teachers": {}, "masked": [], "failed": [], "lost_images": [],
        "left_out": [], "masked_reasons": {},
    }  # fmt: skip


def test_a_damaged_record_is_named(small_cache: SmallCache) -> None:
    (small_cache.path / "teachers/beta/commits/000002.json").write_bytes(b"{}")
    with pytest.raises(CorruptError, match=r"^teachers/beta/commits/000002.json: is no commit record"):
        status(small_cache.path)


def synthetic(path: Path, units: int) -> None:
    """A cache of 8 rows a unit whose records stand for shards that were never written."""
    storage = open_storage(path, create=True)
    source = SourceSpec(kind="folder", root="/")
    build = partial(Plan, source=source, classes=None, views=1, seed=0, unit_rows=8, threads=1)
    tables = (sample_table(8_000, first) for first in range(0, units * 8, 8_000))
    with lease(storage, "run"):
        plan = publish_plan(storage, split_parts(tables, 8), build, "run", unit_rows=8)
        teacher = make_teacher(storage, plan, teacher_spec("alpha"), "run")
    fidelity = {"rmse": 0.0144337, "cosine": 0.999896, "worst_row": 5, "worst_rmse": 0.0152345, "saturated": 0}
    output = {"bytes": 12345, "seal": "ab" * 16, "fidelity": fidelity}
    record = {
        "plan": plan.digest, "row_digest": "ab" * 16, "teacher": "alpha", "fingerprint": teacher.fingerprint,
        "files": {"zarr.json": teacher.files["zarr.json"]}, "masked": 0, "masked_digest": "ab" * 16, "nonfinite": "",
        "outputs": {"global": output, "patch": output},
    }  # fmt: skip
    commits, images = path / "teachers/alpha/commits", path / "images/commits"
    commits.mkdir()
    images.mkdir()
    for unit in range(units):
        (images / f"{unit:06d}.json").touch()  # listed, not read
        (commits / f"{unit:06d}.json").write_bytes(seal_document({**record, "unit": unit}))


@pytest.mark.slow
def test_100_000_committed_units_are_counted_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "large.kpu"
    synthetic(path, 100_000)
    wall, busy = time.perf_counter(), time.process_time()
    found = status(path)
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    print(f"status of 100,000 committed units: {wall:.2f} s, {busy:.2f} s of a processor")
    assert found.complete
    assert found.teachers["alpha"].bytes == 100_000 * 2 * 12345
    assert found.teachers["alpha"].rmse == 0.0144337
    wall = time.perf_counter()
    assert open_cache(path).plan.units == 100_000
    print(f"opening them: {time.perf_counter() - wall:.3f} s")
    assert busy < 5  # of a processor: how long others keep it waiting says nothing about this code
