"""Hugging Face tables whose images are paths without bytes: followed below the source's root, and nowhere else."""

import os
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from kpu.format.commits import ImageStatus
from kpu.pixels.decode import decode_image
from kpu.sources import open_source, source_reader
from tests.support.sources import Data, contents, listed

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(path: Path, *paths: str | None, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([{"bytes": None, "path": each} for each in paths], HF_IMAGE)
    pq.write_table(pa.table({"image": images, **columns}), path, row_group_size=2)
    return path


def read(path: Path | list[str]) -> list[bytes]:
    source = open_source(Data(str(path) if isinstance(path, Path) else path))
    return source_reader(source.spec).read(listed(source))


def test_paths_are_followed_from_the_table_and_from_the_root(tmp_path: Path) -> None:
    for name in ("a.jpg", "train/b.jpg", "train/deep/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    first = table(tmp_path / "train/0.parquet", "b.jpg", "deep/c.jpg", "a.jpg", str(tmp_path / "a.jpg"))
    second = table(tmp_path / "test/0.parquet", "../train/b.jpg", "./deep/../../a.jpg")
    found = read([str(first), str(second)])
    assert found == [b"train/b.jpg", b"train/deep/c.jpg", b"a.jpg", b"a.jpg", b"train/b.jpg", b"a.jpg"]


def test_nothing_outside_the_root_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in-beside").mkdir()
    (tmp_path / "in-beside/x.jpg").write_bytes(b"beside")
    os.mkfifo(tmp_path / "in/pipe.jpg")
    paths = [
        "../secret.jpg",
        str(secret),
        "/etc/passwd",
        f"file://{secret}",
        "in/../../secret.jpg",
        f"{tmp_path}/in/../secret.jpg",
        f"{tmp_path}/in-beside/x.jpg",
        "https://example.org/x.jpg",
        "zip://x.jpg::secret.zip",
        ".",
        "..",
        "pipe.jpg",
        "a\0b.jpg",
        "x" * 5000,
    ]
    found = read(table(tmp_path / "in/0.parquet", *paths))
    assert found == [b""] * len(paths)
    assert {decode_image(data) for data in found} == {ImageStatus.PATH_WITHOUT_FILE}


def test_neither_bytes_nor_path_is_empty(tmp_path: Path) -> None:
    assert [decode_image(data) for data in read(table(tmp_path / "0.parquet", None, ""))] == [ImageStatus.EMPTY] * 2


def test_bytes_win_over_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"file")
    images = pa.array([{"bytes": b"own", "path": "a.jpg"}, {"bytes": None, "path": "a.jpg"}, None], HF_IMAGE)
    pq.write_table(pa.table({"image": images}), tmp_path / "0.parquet")
    assert read(tmp_path / "0.parquet") == [b"own", b"file", b""]


def test_paths_are_followed_on_other_file_systems() -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/paths/images/a.jpg", b"remote")
    images = pa.array([{"bytes": None, "path": each} for each in ("images/a.jpg", "gone.jpg")], HF_IMAGE)
    with system.open("/paths/0.parquet", "wb") as file:
        pq.write_table(pa.table({"image": images}), file)
    assert read(["memory://paths/0.parquet"]) == [b"remote", b""]


def test_the_listing_says_that_paths_are_followed(tmp_path: Path) -> None:
    source = open_source(Data(str(table(tmp_path / "0.parquet", "a.jpg", "b.jpg", "c.jpg"))))
    listed(source)
    assert source.notes == (
        f"3 rows of column 'image' have no bytes: where they have a path, the image is read from it, below {tmp_path}",
    )


def test_a_column_named_like_a_field_is_itself(tmp_path: Path) -> None:
    images = pa.array([{"bytes": b"field", "path": ""}], HF_IMAGE)
    pq.write_table(pa.table({"image": images, "image.bytes": pa.array([b"column"])}), tmp_path / "0.parquet")
    for name, expected in (("image", b"field"), ("image.bytes", b"column")):
        assert list(contents(tmp_path / "0.parquet", image=name).values()) == [expected]
    swapped = pa.table({"image.bytes": pa.array([b"column"]), "image": images})
    pq.write_table(swapped, tmp_path / "1.parquet")
    for name, expected in (("image", b"field"), ("image.bytes", b"column")):
        assert list(contents(tmp_path / "1.parquet", image=name).values()) == [expected]
