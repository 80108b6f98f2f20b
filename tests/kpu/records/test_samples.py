import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kpu.errors import CorruptError
from kpu.records.sample_part import read_part
from kpu.records.samples import Fingerprint, Samples, row_digest, sample_schema, split_parts, write_part
from tests.support.builders import ROWS, UNIT_ROWS, SmallCache, key_of, sample_table


def fingerprint(*tables: pa.Table) -> str:
    state = Fingerprint()
    for table in tables:
        state.update(table)
    return state.hexdigest()


@pytest.fixture
def samples(small_cache: SmallCache) -> Samples:
    return Samples(small_cache.storage, small_cache.plan)


def test_units_and_rows_are_found_by_number(samples: Samples) -> None:
    assert len(samples) == ROWS
    assert samples.unit(1)["key"].to_pylist() == [key_of(row) for row in range(8, 16)]
    assert samples.unit(2).num_rows == 4
    wanted = [19, 0, 7, 7, 8]
    assert samples.take(wanted)["key"].to_pylist() == [key_of(row) for row in wanted]
    assert samples.take([]).num_rows == 0
    assert samples.to_table(["key", "label"]).equals(sample_table().select(["key", "label"]))


@pytest.mark.parametrize("row", [-1, ROWS])
def test_a_row_outside_the_table_is_an_error(samples: Samples, row: int) -> None:
    with pytest.raises(IndexError, match=f"row {row} of {ROWS}"):
        samples.take([0, row])


def test_rows_are_taken_across_parts(tmp_path_factory: pytest.TempPathFactory) -> None:
    from kpu.storage.leases import lease
    from kpu.storage.open import open_storage
    from tests.support.builders import make_plan

    storage = open_storage(tmp_path_factory.mktemp("parts") / "a.kpu", create=True)
    with lease(storage, "run"):
        plan = make_plan(storage, "run", sample_table(300), unit_rows=2)
    assert len(plan.samples_digests) == 3
    samples = Samples(storage, plan)
    wanted = np.random.default_rng(0).permutation(300)
    assert samples.take(wanted)["key"].to_pylist() == [key_of(row) for row in wanted]
    assert samples.to_table().equals(sample_table(300))


def test_a_row_group_is_a_unit_and_pages_carry_checksums() -> None:
    raw = write_part(sample_table(), UNIT_ROWS)
    assert [pq.ParquetFile(pa.BufferReader(raw)).metadata.row_group(k).num_rows for k in range(3)] == [8, 8, 4]
    damaged = bytearray(raw)
    damaged[raw.index(b"\x28\xb5\x2f\xfd") + 20] ^= 1  # inside the first page
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(pa.BufferReader(bytes(damaged)), page_checksum_verification=True)


def test_the_same_rows_give_the_same_bytes_and_fingerprint_however_they_are_cut() -> None:
    whole = sample_table()
    pieces = [whole.slice(start, length) for start, length in ((0, 3), (3, 0), (3, 10), (13, 7))]
    assert write_part(pa.concat_tables(pieces), UNIT_ROWS) == write_part(whole, UNIT_ROWS)
    assert fingerprint(*pieces) == fingerprint(whole)
    assert row_digest(pa.concat_tables(pieces)) == row_digest(whole)


@pytest.mark.parametrize("column", ["key", "view", "file", "label", "draws"])
def test_any_changed_column_changes_the_fingerprint(column: str) -> None:
    table = sample_table()
    changed = {
        "key": pa.array([*table["key"].to_pylist()[:-1], "other"]),
        "view": pa.array(np.arange(ROWS, dtype=np.int32)),
        "file": pa.array([*table["file"].to_pylist()[:-1], "other"]),
        "label": pa.array([0] * ROWS),
        "draws": pa.array([[0.0] * 5] * ROWS, pa.list_(pa.float64())),
    }[column]
    other = table.set_column(table.schema.get_field_index(column), table.schema.field(column), changed)
    assert fingerprint(other) != fingerprint(table)


def test_keys_are_not_confused_when_joined_otherwise() -> None:
    def table(*keys: str) -> pa.Table:
        return pa.table({"key": list(keys), "view": pa.array([0] * len(keys), pa.int32())})

    assert row_digest(table("ab", "c")) != row_digest(table("a", "bc"))


def test_null_and_zero_draws_differ() -> None:
    schema = sample_schema("folder")
    null = sample_table(2)
    zero = null.set_column(4, schema.field("draws"), pa.array([[0.0] * 5, None], pa.list_(pa.float64())))
    shifted = null.set_column(4, schema.field("draws"), pa.array([None, [0.0] * 5], pa.list_(pa.float64())))
    assert len({fingerprint(table) for table in (null, zero, shifted)}) == 3


def test_any_arrow_reads_the_table() -> None:
    """Arrow below 26 writes nulls of a list of fixed size to Parquet, and cannot read them back."""
    assert not any(pa.types.is_fixed_size_list(kind) for kind in sample_schema("folder").types)


def test_parts_are_cut_to_64_units() -> None:
    tables = (sample_table(length, first) for first, length in ((0, 100), (100, 30), (130, 170)))
    parts = list(split_parts(tables, unit_rows=2))
    assert [part.num_rows for part in parts] == [128, 128, 44]
    assert pa.concat_tables(parts)["key"].to_pylist() == sample_table(300)["key"].to_pylist()


def test_a_damaged_or_missing_part_is_named(small_cache: SmallCache) -> None:
    file = small_cache.path / "samples/part-000000.parquet"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    for _ in range(2):
        with pytest.raises(CorruptError, match=r"samples/part-000000.parquet: does not match the plan"):
            Samples(small_cache.storage, small_cache.plan).take([0])
        file.unlink(missing_ok=True)
        with pytest.raises(CorruptError, match=r"samples/part-000000.parquet: is missing"):
            Samples(small_cache.storage, small_cache.plan).take([0])
        file.write_bytes(raw)


def test_draws_beyond_those_of_a_view_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = pa.array([[0.5] * 300_000] * ROWS, pa.list_(pa.float64()))
    table = sample_table().set_column(sample_table().schema.get_field_index("draws"), "draws", draws)
    raw = write_part(table, UNIT_ROWS)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("the pages were decoded"))
    with pytest.raises(CorruptError, match="draws: expected up to 40 values in 8 rows, found 2,400,000"):
        read_part(raw, "samples.parquet", table.schema, range(ROWS), 1)
