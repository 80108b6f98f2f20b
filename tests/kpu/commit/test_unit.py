import json
from pathlib import Path

import numpy as np
import pytest

from kpu.commit.unit import UnitTransaction
from kpu.commit.writer import CacheWriter
from kpu.errors import CorruptError, MismatchError, MissingUnitError
from kpu.format.commits import ImageStatus
from kpu.format.teacher import OutputSpec
from kpu.records.images import load_images
from kpu.records.samples import Samples, row_digest
from kpu.records.units import committed_units, load_record
from kpu.shards.writer import encode_shard
from kpu.storage.leases import lease
from kpu.storage.local import LocalStorage
from kpu.storage.open import open_storage
from kpu.tools.verify import verify
from tests.support.builders import (
    MASKED_ROW,
    NONFINITE_ROW,
    UNIT_ROWS,
    SmallCache,
    build,
    commit_unit,
    encode_unit,
    key_of,
    make_plan,
    make_teacher,
    teacher_spec,
    tree,
    unit_images,
)

SHARD = "teachers/alpha/patch/c/1/0/0"
RECORD = "teachers/alpha/commits/000001.json"


def uncommit(small: SmallCache, *more: str) -> None:
    """Take unit 1 of `alpha` back to where a worker died just before its record."""
    for file in (RECORD, *more):
        (small.path / file).unlink()


def commit_again(small: SmallCache, run: str = "again", shift: float = 0.0) -> None:
    with lease(small.storage, run):
        commit_unit(small.storage, small.plan, small.teachers["alpha"], 1, run, shift)


def test_a_record_says_what_was_committed(small_cache: SmallCache) -> None:
    record = load_record(small_cache.storage, small_cache.plan, "alpha", 1)
    assert record.outputs["patch"].bytes == (small_cache.path / SHARD).stat().st_size
    assert record.row_digest == row_digest(Samples(small_cache.storage, small_cache.plan).unit(1))
    assert record.masked == 0
    assert record.nonfinite == "04"  # row 13 is the sixth of its unit
    fidelity = record.outputs["patch"].fidelity
    assert 0.005 < fidelity.rmse < 0.0145
    assert fidelity.worst_row in range(8, 16)
    assert fidelity.worst_row != NONFINITE_ROW
    assert load_record(small_cache.storage, small_cache.plan, "beta", 0).masked == 1


def test_records_hold_nothing_but_content(small_cache: SmallCache, tmp_path: Path) -> None:
    other = build(tmp_path / "elsewhere" / "b.kpu", run="another-run")
    assert tree(other.path) == tree(small_cache.path)


def test_images_come_back_as_they_were_committed(small_cache: SmallCache) -> None:
    for unit in range(3):
        record, images = load_images(small_cache.storage, small_cache.plan, unit)
        for name in ("digest", "status", "size"):
            assert np.array_equal(getattr(images, name), getattr(unit_images(unit), name))
        assert record.masked == (unit == MASKED_ROW // UNIT_ROWS)


def test_committed_units_are_those_with_a_record(small_cache: SmallCache) -> None:
    uncommit(small_cache)
    for name in ("000001.json.tmp", "x.json", "000009.json"):
        (small_cache.path / "teachers/alpha/commits" / name).touch()
    assert committed_units(small_cache.storage, "teachers/alpha", 3).tolist() == [True, False, True]
    assert committed_units(small_cache.storage, "teachers/nobody", 3).tolist() == [False] * 3
    with pytest.raises(MissingUnitError, match="'alpha' has no committed unit 1"):
        load_record(small_cache.storage, small_cache.plan, "alpha", 1)


def test_a_committed_unit_is_not_done_again(small_cache: SmallCache) -> None:
    before = tree(small_cache.path)
    commit_again(small_cache, shift=3.0)
    assert tree(small_cache.path) == before


def test_a_retry_over_its_own_shards_gives_the_same_bytes(small_cache: SmallCache) -> None:
    before = tree(small_cache.path)
    uncommit(small_cache)
    commit_again(small_cache)
    assert tree(small_cache.path) == before
    assert not (small_cache.path / ".tmp/quarantine").exists()


@pytest.mark.parametrize("codec", ["uniform", "rotated", "fp32", "fp16", "bf16"])
def test_a_shard_within_tolerance_stays_and_the_record_describes_it(cache_of, codec: str) -> None:
    small = cache_of(codec)
    uncommit(small)
    standing = (small.path / SHARD).read_bytes()
    first = load_record_of(small)
    # Under one step of the grid, under a hundredth of a standard deviation, about one step of bfloat16.
    commit_again(small, shift={"uniform": 0.03, "rotated": 0.01, "fp32": 0.005, "fp16": 0.005, "bf16": 0.001}[codec])
    assert (small.path / SHARD).read_bytes() == standing
    assert load_record_of(small) == first  # the fidelity is that of what stands, against the features themselves
    assert verify(small.path).ok


def load_record_of(small: SmallCache) -> object:
    if not (small.path / RECORD).exists():
        return json.loads(build_record(small))
    return json.loads((small.path / RECORD).read_bytes())


def build_record(small: SmallCache) -> bytes:
    commit_again(small, run="reference")
    raw = (small.path / RECORD).read_bytes()
    (small.path / RECORD).unlink()
    return raw


@pytest.mark.parametrize("codec", ["uniform", "rotated", "fp32"])
def test_a_shard_of_other_values_is_moved_aside(cache_of, codec: str) -> None:
    small = cache_of(codec)
    before = tree(small.path)
    uncommit(small, SHARD, "teachers/alpha/global/c/1/0")
    commit_again(small, run="wrong", shift=0.2)
    uncommit(small)
    assert tree(small.path)[SHARD] != before[SHARD]
    commit_again(small)
    assert tree(small.path) == before
    assert (small.path / ".tmp/quarantine/again" / SHARD).exists()


def foreign(small: SmallCache, kind: str) -> bytes:
    good = (small.path / SHARD).read_bytes()
    array = small.teachers["alpha"].layouts["patch"]
    values = encode_unit(small.teachers["alpha"], 1).outputs["patch"].stored.copy()
    flipped = bytearray(good)
    if kind == "empty":
        return b""
    if kind == "foreign":
        return b"somebody else's file, and a long one it is" * 40
    if kind == "truncated":
        return good[:-7]
    if kind == "flipped chunk":
        flipped[3] ^= 1
    if kind == "flipped seal":
        flipped[-(16 * array.chunks_per_shard + 4) - 5] ^= 1
    if kind == "other unit":
        return (small.path / "teachers/alpha/patch/c/0/0/0").read_bytes()
    if kind == "other mask":
        values[NONFINITE_ROW - 8] = 0
        return encode_shard(values, array, 0).data
    if kind == "masked too much":
        values[0] = array.fill
        return encode_shard(values, array, 0).data
    if kind == "one fill value":
        values[NONFINITE_ROW - 8] = array.fill
        values[1, 2, 3] = array.fill
        return encode_shard(values, array, 0).data
    return bytes(flipped)


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "foreign",
        "truncated",
        "flipped chunk",
        "flipped seal",
        "other unit",
        "other mask",
        "masked too much",
        "one fill value",
    ],
)
def test_whatever_else_took_the_name_is_moved_aside_while_there_is_no_record(
    small_cache: SmallCache, kind: str
) -> None:
    before = tree(small_cache.path)
    uncommit(small_cache)
    intruder = foreign(small_cache, kind)
    (small_cache.path / SHARD).write_bytes(intruder)
    commit_again(small_cache)
    assert tree(small_cache.path) == before
    assert (small_cache.path / ".tmp/quarantine/again" / SHARD).read_bytes() == intruder


def test_a_committed_shard_is_never_moved_even_if_it_is_damaged(small_cache: SmallCache) -> None:
    path = small_cache.path / SHARD
    path.write_bytes(foreign(small_cache, "flipped chunk"))
    before = tree(small_cache.path)
    commit_again(small_cache)
    assert tree(small_cache.path) == before


class Interfering(LocalStorage):
    """Another driver acts at the worst moment: between our look for a commit record and our moving its shard aside."""

    def __init__(self, small: SmallCache, then) -> None:
        super().__init__(small.path)
        self.then = then

    def quarantine(self, key: str, *, run: str) -> None:
        then, self.then = self.then, None
        if then:
            then()
        super().quarantine(key, run=run)


def test_two_drivers_that_disagree_leave_what_the_first_record_describes(small_cache: SmallCache) -> None:
    before = tree(small_cache.path)
    uncommit(small_cache)
    # The other driver's shards stand. We disagree with them; it commits while we are about to move its shard aside.
    storage = Interfering(small_cache, lambda: commit_again(small_cache, run="other"))
    with lease(storage, "ours"):
        commit_unit(storage, small_cache.plan, small_cache.teachers["alpha"], 1, "ours", shift=0.2)
    assert storage.then is None
    assert tree(small_cache.path) == before
    assert verify(small_cache.path).ok


def test_a_driver_whose_shard_was_moved_aside_under_it_puts_it_back(small_cache: SmallCache) -> None:
    before = tree(small_cache.path)
    uncommit(small_cache)

    other_shard = foreign(small_cache, "other mask")

    class Robbed(LocalStorage):
        def publish(self, key: str, data: bytes, *, run: str) -> bool:
            if key == RECORD:  # the other driver found no record, and replaces our shard
                super().quarantine(SHARD, run=run)
                super().publish(SHARD, other_shard, run=run)
            return super().publish(key, data, run=run)

    storage = Robbed(small_cache.path)
    with lease(storage, "ours"):
        commit_unit(storage, small_cache.plan, small_cache.teachers["alpha"], 1, "ours")
    assert tree(small_cache.path) == before


def begin(small: SmallCache, unit: int, run: str) -> UnitTransaction:
    return CacheWriter(small.storage, small.plan, run).unit(unit, Samples(small.storage, small.plan).unit(unit))


def test_another_image_is_refused_by_name(small_cache: SmallCache) -> None:
    for field, message in (("digest", "bytes changed"), ("status", "expected 'ok', found 'empty'")):
        images = unit_images(1)
        getattr(images, field)[2] ^= 1
        with (
            lease(small_cache.storage, "later"),
            pytest.raises(MismatchError, match=f"'{key_of(10)}' \\(row 10\\): .*{message}"),
        ):
            begin(small_cache, 1, "later").images(images)


def test_a_row_may_be_masked_for_another_reason_than_by_an_earlier_release(small_cache: SmallCache) -> None:
    unit = MASKED_ROW // UNIT_ROWS
    images, before = unit_images(unit), tree(small_cache.path)
    images.status[MASKED_ROW - unit * UNIT_ROWS] = ImageStatus.UNSUPPORTED_PIXELS
    with lease(small_cache.storage, "later"):
        begin(small_cache, unit, "later").images(images)
    assert tree(small_cache.path) == before


def test_images_left_without_a_record_are_kept_or_replaced(small_cache: SmallCache) -> None:
    before = tree(small_cache.path)
    for change in (lambda raw: raw, lambda raw: raw[:-1], lambda _: b"foreign"):
        (small_cache.path / "images/commits/000001.json").unlink()
        shard = small_cache.path / "images/digest/c/1/0"
        shard.write_bytes(change(shard.read_bytes()))
        with lease(small_cache.storage, "later"):
            begin(small_cache, 1, "later").images(unit_images(1))
        assert tree(small_cache.path) == before


def test_a_unit_needs_its_images_first_and_their_rows(small_cache: SmallCache) -> None:
    uncommit(small_cache)
    teacher, samples = small_cache.teachers["alpha"], Samples(small_cache.storage, small_cache.plan)
    features, writer = encode_unit(teacher, 1), CacheWriter(small_cache.storage, small_cache.plan, "run")
    with lease(small_cache.storage, "run"):
        with pytest.raises(MismatchError, match=r"expected the rows of images/commits/000001\.json .*found other rows"):
            writer.unit(1, samples.unit(0)).teacher(teacher, features)
        (small_cache.path / "images/commits/000001.json").unlink()
        with pytest.raises(MismatchError, match="images are committed first"):
            writer.unit(1, samples.unit(1)).teacher(teacher, features)


@pytest.mark.parametrize("first", ["images", "teacher"])
def test_masks_come_from_the_committed_images(small_cache: SmallCache, first: str) -> None:
    unit = MASKED_ROW // UNIT_ROWS
    (small_cache.path / f"teachers/alpha/commits/{unit:06d}.json").unlink()
    before = tree(small_cache.path)
    with lease(small_cache.storage, "run"):
        transaction = begin(small_cache, unit, "run")
        if first == "images":
            transaction.images(unit_images(unit))
        record = transaction.teacher(small_cache.teachers["alpha"], encode_unit(small_cache.teachers["alpha"], unit))
    assert record.masked == 1
    assert before.items() <= tree(small_cache.path).items()
    assert verify(small_cache.path).ok


def test_masked_rows_hold_the_fill_whatever_was_computed(small_cache: SmallCache) -> None:
    teacher = small_cache.teachers["alpha"]
    uncommit(small_cache, SHARD)
    before = tree(small_cache.path)
    features = encode_unit(teacher, 1)
    features.outputs["patch"].stored[NONFINITE_ROW - 8] = 77
    with lease(small_cache.storage, "run"):
        begin(small_cache, 1, "run").teacher(teacher, features)
    assert (features.outputs["patch"].stored[NONFINITE_ROW - 8] == 77).all()
    assert before.items() <= tree(small_cache.path).items()
    assert verify(small_cache.path).ok


def test_a_record_of_a_teacher_with_14_outputs_is_under_4_kb(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "a.kpu", create=True)
    outputs = (
        *(OutputSpec(name=f"layer{layer}.patch", shape=(4, 6), grid=(2, 2)) for layer in range(12)),
        OutputSpec(name="patch", shape=(4, 6), grid=(2, 2)),
        OutputSpec(name="global", shape=(8,)),
    )
    with lease(storage, "run"):
        plan = make_plan(storage, "run")
        teacher = make_teacher(storage, plan, teacher_spec("beta", outputs=outputs), "run")
        record = commit_unit(storage, plan, teacher, 1, "run")
    assert len(record.outputs) == 14
    size = (tmp_path / "a.kpu/teachers/beta/commits/000001.json").stat().st_size
    largest = size + 14 * 7 * 2 + 1024  # shards of 64 MB, rows up to 1e9, and a bit for each of 4,096 rows
    assert largest < 4096


def test_a_record_in_another_units_place_is_refused(small_cache: SmallCache) -> None:
    commits = small_cache.path / "teachers/alpha/commits"
    (commits / "000001.json").write_bytes((commits / "000000.json").read_bytes())
    with pytest.raises(CorruptError, match=r"^teachers/alpha/commits/000001.json: expected unit 1 of plan .* found 0"):
        load_record(small_cache.storage, small_cache.plan, "alpha", 1)
    beta = small_cache.path / "teachers/beta/commits/000001.json"
    (commits / "000001.json").write_bytes(beta.read_bytes())
    with pytest.raises(CorruptError, match="is of teacher 'beta'"):
        load_record(small_cache.storage, small_cache.plan, "alpha", 1)
