"""Parquet: which columns are taken, what keys and addresses they give, and reading in bounded memory."""

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kpu.errors import SourceError
from kpu.sources import files, open_source, source_reader
from kpu.sources.parquet import row_groups
from tests.support.sources import Data, contents, listed, listing

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, columns: dict[str, Any], rows_a_group: int = 3, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows_a_group)
    return path


def images(count: int) -> pa.Array:
    return pa.array([{"bytes": f"image {i}".encode(), "path": f"{i}.jpg"} for i in range(count)], HF_IMAGE)


def test_hugging_face_layout(tmp_path: Path) -> None:
    path = write(tmp_path / "t-0.parquet", {"label": [5, 6, None, 8], "image": images(4)})
    assert listing(path).to_pylist() == [
        {"key": f"t-0:{i}", "file": "t-0.parquet", "row_group": i // 3, "row": i % 3, "label": [5, 6, None, 8][i]}
        for i in range(4)
    ]
    assert contents(path) == {f"t-0:{i}": f"image {i}".encode() for i in range(4)}


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_binary_column_of_any_name(tmp_path: Path, kind: pa.DataType) -> None:
    path = write(tmp_path / "t.pq", {"name": ["a", "b"], "jpeg": pa.array([b"1", None], kind)})
    assert contents(path) == {"t:0": b"1", "t:1": b""}


def test_null_images_give_no_bytes(tmp_path: Path) -> None:
    column = pa.array([None, {"bytes": None, "path": "x"}, {"bytes": b"1", "path": None}], HF_IMAGE)
    assert list(contents(write(tmp_path / "t.parquet", {"image": column})).values()) == [b"", b"", b"1"]


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    columns = {
        "left": pa.array([b"l0", b"l1"]),
        "right": pa.array([b"r0", b"r1"]),
        "species": pa.array([4, 5], pa.uint8()),
        "id": ["x", "y/ü ../z"],
        "number": [70, 71],
    }
    path = write(tmp_path / "t.parquet", columns)
    with pytest.raises(SourceError, match=r"t\.parquet: expected one column of images .* found several: left, right"):
        listing(path)
    assert contents(path, image="right", key="id") == {"x": b"r0", "y/ü ../z": b"r1"}
    table = listing(path, image="left", key="number", label="species")
    assert (table["key"].to_pylist(), table["label"].to_pylist()) == (["70", "71"], [4, 5])
    assert listing(path, image="left")["label"].to_pylist() == [None, None]


def test_missing_or_unfit_columns_are_named_with_those_that_exist(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {"image": pa.array([b"1"]), "name": ["cat"]})
    for option in ("image", "label", "key"):
        with pytest.raises(SourceError, match=rf"has no column 'x' \(data\.{option}\); its columns are image, name"):
            listing(path, **{option: "x"})
    with pytest.raises(
        SourceError, match=r"'name' \(data\.image\): expected binary or struct<bytes, path>, found string"
    ):
        listing(path, image="name")
    with pytest.raises(SourceError, match=r"found none among the columns text \(string\)"):
        listing(write(tmp_path / "u.parquet", {"text": ["a"]}))


@pytest.mark.parametrize("column", [pa.array(["cat", "dog"]), pa.array([1.0, None])])
@pytest.mark.parametrize("label", [None, "label"])
def test_labels_that_are_no_class_numbers_are_refused(tmp_path: Path, column: pa.Array, label: str | None) -> None:
    path = write(tmp_path / "t.parquet", {"image": images(2), "label": column})
    expected = rf"t\.parquet: column 'label' \(data\.label\): expected integers, .* found {column.type}; .*label: false"
    with pytest.raises(SourceError, match=expected):
        listing(path, label=label)
    assert listing(path, label=False)["label"].to_pylist() == [None, None]


def test_a_named_column_without_any_label_is_refused(tmp_path: Path) -> None:
    columns = {"image": images(2), "label": pa.nulls(2), "species": pa.array([None, 4], pa.int16())}
    path = write(tmp_path / "t.parquet", columns)
    assert listing(path)["label"].to_pylist() == [None, None]
    assert listing(path, label="species")["label"].to_pylist() == [None, 4]
    for limit, label in ((None, "label"), (1, "species")):
        with pytest.raises(
            SourceError, match=rf"column '{label}' \(data\.label\): .* found none \(null, or below 0, in every row"
        ):
            listing(path, label=label, limit=limit)
    assert open_source(Data(str(path), label=False)).spec == open_source(Data(str(path))).spec


@pytest.mark.parametrize(
    ("option", "column", "found"),
    [
        ("key", pa.array([b"a", b"\xff\xfe"]), r"expected text in UTF-8, or numbers, found binary \(Invalid UTF8"),
        ("key", pa.array([{"x": 1}, {"x": 2}]), "expected text in UTF-8, or numbers, found struct<x: int64>"),
        ("key", pa.array([[1], [2]]), r"expected text in UTF-8, or numbers, found list<.*: int64>"),
        (
            "label",
            pa.array([0, 2**63], pa.uint64()),
            r"expected integers of 64 bits with a sign, found uint64 \(.*9223372036854775808",
        ),
    ],
)
def test_columns_of_values_that_cannot_be_taken(tmp_path: Path, option: str, column: pa.Array, found: str) -> None:
    path = write(tmp_path / "t.parquet", {"image": images(2), "taken": column})
    with pytest.raises(SourceError, match=rf"t\.parquet: column 'taken' \(data\.{option}\): {found}"):
        listing(path, image="image", **{option: "taken"})


def test_keys_of_bytes_and_large_labels(tmp_path: Path) -> None:
    columns = {"image": images(2), "id": pa.array(["ä".encode(), b"b"]), "label": pa.array([0, 2**63 - 1], pa.uint64())}
    table = listing(write(tmp_path / "t.parquet", columns), image="image", key="id")
    assert (table["key"].to_pylist(), table["label"].to_pylist()) == (["ä", "b"], [0, 2**63 - 1])


def test_column_missing_in_a_later_file_is_named_with_the_file(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", {"image": images(2)})
    write(tmp_path / "1.parquet", {"picture": images(2)})
    with pytest.raises(SourceError, match=r"1\.parquet: has no column 'image' .*; its columns are picture"):
        listing(tmp_path)


def test_class_names(tmp_path: Path) -> None:
    columns = {"image": images(1), "label": [0]}
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    for name, metadata, expected in [
        ("a", {"class_names": "cat, dog"}, ("cat", "dog")),
        ("b", {"huggingface": json.dumps({"info": {"features": features}})}, ("cat", "dog")),
        ("c", {"huggingface": "{broken"}, None),
        ("d", None, None),
    ]:
        path = write(tmp_path / f"{name}.parquet", columns, metadata=metadata)
        assert open_source(Data(str(path))).classes == expected
    with pytest.raises(SourceError, match=r"d\.parquet: its metadata names other classes than a\.parquet"):
        listing([tmp_path / "a.parquet", tmp_path / "d.parquet"])


def test_several_files_and_folders(tmp_path: Path) -> None:
    for name in ("train/0", "train/1", "test/0"):
        write(tmp_path / f"{name}.parquet", {"image": images(2)})
    assert listing(tmp_path / "train")["key"].to_pylist() == ["0:0", "0:1", "1:0", "1:1"]
    assert listing(tmp_path / "*" / "0.parquet")["key"].to_pylist() == [
        "test/0:0",
        "test/0:1",
        "train/0:0",
        "train/0:1",
    ]
    assert listing(tmp_path / "{train,test}", limit=5)["key"].to_pylist()[-1] == "test/0:0"


def test_duplicate_keys_give_both_places(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": images(6), "id": list("uvwxyu")})
    with pytest.raises(
        SourceError, match=r"'u': first in a\.parquet \(row group 0, row 0\), again in a\.parquet \(row group 1, row 2"
    ):
        listing(path, key="id")
    assert len(listing(path, key="id", limit=5)) == 5
    write(tmp_path / "a.pq", {"image": images(2), "id": ["k", None]})
    with pytest.raises(SourceError, match=r"'a:0': first in a\.parquet \(row group 0, row 0\), again in a\.pq"):
        listing(tmp_path)
    with pytest.raises(SourceError, match=r"a\.pq: column 'id' \(data\.key\) is null in row 1"):
        listing(tmp_path / "a.pq", key="id")


def test_damaged_and_empty_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {"image": images(50)})
    whole = path.read_bytes()
    for data in (b"", b"hello", whole[:-20], whole[:100]):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=r"t\.parquet: cannot be read"):
            listing(path)
    write(path, {"image": images(0)})
    with pytest.raises(SourceError, match="1 Parquet files hold no row"):
        listing(path)


def test_file_that_changed_since_planning_is_an_error_not_a_masked_row(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {"image": images(9)})
    source = open_source(Data(str(path)))
    table = listed(source)
    write(path, {"image": images(5)})
    with pytest.raises(
        SourceError,
        match=r"t\.parquet \(key 't:5'\): expected row 2 of row group 1, found 2 rows in it: it was rewritten",
    ):
        source_reader(source.spec).read(table)
    write(path, {"image": images(2)})
    with pytest.raises(SourceError, match=r"\(key 't:3'\): expected row group 1, found 1 row groups"):
        source_reader(source.spec).read(table.slice(3))
    write(path, {"picture": images(9)})
    with pytest.raises(SourceError, match="has no column 'image'"):
        source_reader(source.spec).read(table)
    path.unlink()
    with pytest.raises(SourceError, match=r"t\.parquet \(key 't:0'\): no such file"):
        source_reader(source.spec).read(table)


@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"compression": "none", "write_page_checksum": True}])
def test_damaged_pages_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(files, "DELAYS", ())
    path = tmp_path / "t.parquet"
    noise = [os.urandom(1000) for _ in range(20)]
    pq.write_table(pa.table({"image": noise}), path, use_dictionary=False, **options)
    source = open_source(Data(str(path)))
    table = listed(source)
    data = bytearray(path.read_bytes())
    data[1000:1200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"t\.parquet"):
        source_reader(source.spec).read(table)


@pytest.mark.parametrize("block_bytes", [1, 500, 2**26])
def test_rows_come_in_the_order_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    # Small blocks stand for row groups that are larger than memory.
    monkeypatch.setattr(row_groups, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(row_groups, "_HELD_BYTES", 4 * block_bytes)
    rng = np.random.default_rng(0)
    values = [rng.bytes(size) for size in rng.integers(1, 90, 100)]
    write(tmp_path / "a.parquet", {"image": pa.array(values)}, 40)
    write(tmp_path / "b.parquet", {"image": pa.array(values[::-1])}, 7)
    source = open_source(Data(str(tmp_path)))
    table = listed(source)
    reader = source_reader(source.spec)
    expected = values + values[::-1]
    assert reader.read(table) == expected
    for _ in range(5):
        order = rng.integers(0, 200, 30)
        assert pickle.loads(pickle.dumps(reader)).read(table.take(order)) == [expected[i] for i in order]
        assert reader.read(table.take(order)) == [expected[i] for i in order]


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": images(300)}, 20)
    source = open_source(Data(str(tmp_path)))
    table, reader = listed(source), source_reader(source.spec)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: reader.read(table.slice(i % 290, 10)), range(0, 3000, 7)))
    for i, part in zip(range(0, 3000, 7), found, strict=True):
        assert part == [f"image {j}".encode() for j in range(i % 290, i % 290 + 10)]


def test_memory_is_bounded_by_few_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_groups, "_HELD_BYTES", 300_000)
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [os.urandom(1000) for _ in range(2000)]}), path, row_group_size=100)
    source = open_source(Data(str(path)))
    table, reader = listed(source), source_reader(source.spec)
    pool = pa.default_memory_pool()
    before, peak = pool.bytes_allocated(), 0
    for start in range(0, 2000, 50):
        reader.read(table.slice(start, 50))
        peak = max(peak, pool.bytes_allocated() - before)
    assert peak < 1_000_000, "of 2,000,000 bytes in all"


def test_other_file_systems(tmp_path: Path) -> None:
    system: Any = fsspec.filesystem("memory")
    system.pipe_file("/tables/0.parquet", write(tmp_path / "t.parquet", {"image": images(5)}).read_bytes())
    try:
        assert contents("memory://tables") == {f"0:{i}": f"image {i}".encode() for i in range(5)}
        assert len(contents("memory://tables/*.parquet")) == 5
    finally:
        system.rm("/tables", recursive=True)


def test_real_table(shared_data: Path) -> None:
    source = open_source(Data(str(shared_data / "data/cifar10/test-*.parquet")))
    assert source.classes is not None
    assert source.classes[:2] == ("airplane", "automobile")
    table = listed(source)
    assert table.num_rows == 10_000
    assert np.bincount(table["label"].to_numpy()).tolist() == [1000] * 10
    assert all(data.startswith(b"\xff\xd8\xff") for data in source_reader(source.spec).read(table.slice(480, 40)))


def test_labels_below_zero_are_stored_and_count_as_none(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {"image": images(2), "label": [-1, -100]})
    assert listing(path)["label"].to_pylist() == [-1, -100]
    with pytest.raises(SourceError, match=r"\(data\.label\): expected a class number in some row, found none"):
        listing(path, label="label")
