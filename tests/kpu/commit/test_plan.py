import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kpu.commit.plan import check_same_plan, publish_plan
from kpu.errors import CorruptError, MismatchError, NotACacheError, SourceError
from kpu.format.plan import Plan
from kpu.records.plan import load_plan
from kpu.records.samples import Samples, split_parts
from kpu.storage.leases import lease
from kpu.storage.open import open_storage
from kpu.util.digests import seal_document
from tests.support.builders import Hooked, SmallCache, make_plan, sample_table, tree


def test_the_plan_that_is_loaded_is_the_one_that_was_published(small_cache: SmallCache) -> None:
    loaded = load_plan(small_cache.storage)
    assert loaded == small_cache.plan
    assert (loaded.rows, loaded.units, loaded.samples) == (20, 3, 20)


def test_there_is_no_plan_in_an_empty_folder(tmp_path: Path) -> None:
    assert load_plan(open_storage(tmp_path)) is None


def test_planning_again_changes_nothing(small_cache: SmallCache) -> None:
    before = tree(small_cache.path)
    with lease(small_cache.storage, "again"):
        assert make_plan(small_cache.storage, "again") == small_cache.plan
    assert tree(small_cache.path) == before


def test_planning_other_rows_into_a_cache_is_refused(small_cache: SmallCache) -> None:
    before = tree(small_cache.path)
    with lease(small_cache.storage, "again"), pytest.raises(MismatchError, match="out"):
        make_plan(small_cache.storage, "again", sample_table(19))
    assert tree(small_cache.path) == before


@pytest.mark.parametrize(
    ("field", "value"), [("fingerprint", "x"), ("seed", 1), ("unit_rows", 16), ("classes", None), ("views", 2)]
)
def test_a_differing_plan_is_refused_by_the_name_of_the_field(
    small_cache: SmallCache, field: str, value: object
) -> None:
    with pytest.raises(MismatchError, match=field):
        check_same_plan(small_cache.plan, small_cache.plan.model_copy(update={field: value}))


def test_threads_and_the_place_of_the_images_may_differ(small_cache: SmallCache) -> None:
    plan = small_cache.plan
    moved = plan.source.model_copy(update={"root": "s3://elsewhere"})
    other = plan.model_copy(update={"threads": 9, "source": moved})
    assert other.digest != plan.digest
    check_same_plan(plan, other)  # raises otherwise
    with pytest.raises(MismatchError, match="seed"):
        check_same_plan(plan, other.model_copy(update={"seed": plan.seed + 1}))


def test_what_an_interrupted_plan_of_other_data_left_is_replaced(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "a.kpu", create=True)
    clean = open_storage(tmp_path / "clean.kpu", create=True)
    with lease(storage, "first"), pytest.raises(ZeroDivisionError):
        publish_plan(
            storage,
            split_parts(iter([sample_table(12)]), 8),
            lambda **_: 1 // 0,
            "first",
            unit_rows=8,
        )
    for each in (storage, clean):
        with lease(each, "second"):
            make_plan(each, "second")
    assert tree(tmp_path / "a.kpu") == tree(tmp_path / "clean.kpu")
    assert (tmp_path / "a.kpu/.tmp/quarantine/second/samples/part-000000.parquet").exists()


@pytest.fixture(params=["folder", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "a.kpu") if request.param == "folder" else f"memory://{tmp_path}/a.kpu"


def assert_planned(place: str, plan: Plan) -> None:
    """The plan stands, and everything that it seals."""
    storage = open_storage(place)
    assert load_plan(storage) == plan
    assert Samples(storage, plan).to_table().equals(sample_table())


def test_a_plan_that_comes_between_the_files_of_another_driver_stands(place: str) -> None:
    """The other one moved the parts aside, and dies before it could publish a plan or put them back."""
    storage = open_storage(place, create=True)

    class Killed(BaseException):
        pass

    def other() -> None:
        def die() -> None:
            raise Killed

        with lease(storage, "other"), pytest.raises(Killed):
            make_plan(Hooked(storage, "publish", "plan.json", die), "other", unit_rows=16)

    with lease(storage, "run"):
        plan = make_plan(Hooked(storage, "publish", "plan.json", other), "run")
    assert plan.unit_rows == 8
    assert_planned(place, plan)


@pytest.mark.parametrize("key", ["samples/part-000000.parquet", "images/size/zarr.json"])
def test_a_driver_puts_back_what_it_moved_when_the_plan_came(place: str, key: str) -> None:
    storage = open_storage(place, create=True)
    with lease(storage, "dead"), pytest.raises(ZeroDivisionError):
        make_plan(Hooked(storage, "publish", "plan.json", lambda: 1 // 0), "dead")
    plans = []

    def first() -> None:
        with lease(storage, "first"):
            plans.append(make_plan(storage, "first"))

    with lease(storage, "second"), pytest.raises(MismatchError, match=r"conflicts with plan\.json"):
        make_plan(Hooked(storage, "quarantine", key, first), "second", unit_rows=16)
    assert_planned(place, plans[0])


def test_a_foreign_zarr_store_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {"mine": 1}}')
    before = tree(tmp_path)
    storage = open_storage(tmp_path)
    with lease(storage, "run"), pytest.raises(MismatchError, match=str(tmp_path)):
        make_plan(storage, "run")
    assert tree(tmp_path) == before


def test_no_rows_are_an_error(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with lease(storage, "run"), pytest.raises(SourceError, match="no samples"):
        make_plan(storage, "run", sample_table(0))


def test_a_newer_format_is_refused(small_cache: SmallCache) -> None:
    file = small_cache.path / "plan.json"
    document = json.loads(file.read_bytes())
    del document["digest"]
    file.write_bytes(seal_document({**document, "version": 2}))
    with pytest.raises(NotACacheError, match="version 2; this release reads 'kpu-cache' version 1"):
        load_plan(small_cache.storage)


@pytest.mark.parametrize("file", ["zarr.json", "teachers/zarr.json", "images/zarr.json", "images/status/zarr.json"])
def test_damaged_metadata_is_named(small_cache: SmallCache, file: str) -> None:
    path = small_cache.path / file
    path.write_bytes(path.read_bytes().replace(b" ", b"\t", 1))
    with pytest.raises(CorruptError, match=f"^{file}: is damaged"):
        load_plan(small_cache.storage)
    path.unlink()
    with pytest.raises(CorruptError, match=f"^{file}: is missing"):
        load_plan(small_cache.storage)


_STREAMED = """
from functools import partial
import sys
from pathlib import Path
import numpy as np, pyarrow as pa
from kpu.storage.leases import lease
from kpu.records.samples import Samples, sample_schema
from kpu.storage.open import open_storage
from kpu.commit.plan import publish_plan
from kpu.records.samples import split_parts
from kpu.format.teacher import Plan, SourceSpec

ROWS, UNIT = int(sys.argv[2]), 4096
schema = sample_schema("tar")

def tables():
    for first in range(0, ROWS, 100_000):
        rows = np.arange(first, min(first + 100_000, ROWS))
        keys = pa.array([f"shards/imagenet-{row // 10000:06d}.tar/n{row:012d}" for row in rows])
        yield pa.table(
            {
                "key": keys,
                "view": pa.array(np.zeros(len(rows), np.int32)),
                "file": pa.array([f"shards/imagenet-{row // 10000:06d}.tar" for row in rows]),
                "offset": pa.array(rows * 113_664),
                "length": pa.array(rows % 100_000),
                "label": pa.array(rows % 1000),
                "draws": pa.nulls(len(rows), pa.list_(pa.float64())),
            },
            schema=schema,
        )

plan = partial(Plan, source=SourceSpec(kind="tar", root="/"), classes=None, views=1, seed=0, unit_rows=UNIT, threads=1)

storage = open_storage(sys.argv[1], create=True)
with lease(storage, "run"):
    made = publish_plan(storage, split_parts(tables(), UNIT), plan, "run", unit_rows=UNIT)
samples = Samples(storage, made)
assert sum(table.num_rows for table in samples.iter_batches()) == ROWS
assert samples.take([ROWS - 1])["key"][0].as_py().endswith(f"{ROWS - 1:012d}")
peak = next(line for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024)  # ru_maxrss would begin with what the parent has
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows_of_the_plan(tmp_path: Path) -> None:
    def peak_mb(rows: int) -> int:
        command = [sys.executable, "-c", _STREAMED, str(tmp_path / f"{rows}.kpu"), str(rows)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)

    small, large = peak_mb(600_000), peak_mb(3_000_000)
    print(f"peak memory: {small} MB at 600,000 rows, {large} MB at 3,000,000 rows")
    assert large < small + 100
    assert large < 1000


def test_samples_are_read_back_after_planning(small_cache: SmallCache) -> None:
    assert Samples(small_cache.storage, load_plan(small_cache.storage)).to_table().equals(sample_table())
