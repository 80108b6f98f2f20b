"""WebDataset tars: addresses from headers alone, odd members, and strictness about damage."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
import webdataset

from kpu.errors import ConfigError, SourceError
from kpu.sources import open_source, source_reader
from tests.support.sources import FORMATS, Data, contents, listed, listing, pack

SMALL = [
    ("a.jpg", b"A" * 700),
    ("a.cls", b"3"),
    ("a.txt", b"name"),
    ("b.png", b"B"),
    ("b.cls", b" 12\n"),
    ("c.jpg", b""),
]


def test_samples_of_a_shard(tmp_path: Path) -> None:
    path = pack(tmp_path / "s-0.tar", SMALL)
    assert listing(path).to_pylist() == [
        {"key": "s-0/a", "file": "s-0.tar", "offset": 512, "length": 700, "label": 3},
        {"key": "s-0/b", "file": "s-0.tar", "offset": 512 * 8, "length": 1, "label": 12},
        {"key": "s-0/c", "file": "s-0.tar", "offset": 512 * 12, "length": 0, "label": None},
    ]
    assert contents(path) == {"s-0/a": b"A" * 700, "s-0/b": b"B", "s-0/c": b""}


@pytest.mark.parametrize("kind", FORMATS)
def test_names_of_every_kind_are_only_keys(tmp_path: Path, kind: str) -> None:
    names = [
        "a b",
        "日本/猫",
        "../../etc/passwd",
        "/absolute/x",
        "./here",
        "d" * 90 + "/" + "n" * 60,
        "quote'\"\n",
        "é" * 40,
    ]
    if kind != "ustar":
        names.append("long/" * 60 + "name")
    members = [(f"{name}.jpg", name.encode()) for name in names]
    path = pack(tmp_path / "in" / "s.tar", members, kind, mtime=1.5)
    assert contents(path) == {f"s/{name}": name.encode() for name in names}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "s.tar"], "nothing is unpacked"


def test_names_that_are_not_unicode_stay_apart(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", [("caf\udce9.jpg", b"1"), ("caf\udce8.jpg", b"2")], "gnu")
    assert contents(path) == {"s/caf\\xe9": b"1", "s/caf\\xe8": b"2"}


def test_members_agree_with_webdataset(tmp_path: Path) -> None:
    names = [
        "x.jpg",
        "x.seg.png",
        "x.json",
        "y.v2.jpg",
        "dir.d/z.jpg",
        "dir.d/z.cls",
        "dir/.hidden",
        "noextension",
        "w.JPG",
    ]
    path = pack(tmp_path / "s.tar", [(name, b"5") for name in names])
    theirs = [s["__key__"] for s in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)]
    assert [key.removeprefix("s/") for key in contents(path)] == [key for key in theirs if key != "dir/"]


def test_links_folders_and_devices_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, kind in [
            ("d", tarfile.DIRTYPE),
            ("l.jpg", tarfile.SYMTYPE),
            ("h.jpg", tarfile.LNKTYPE),
            ("p.jpg", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("real.jpg")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"real"))
    assert contents(tmp_path / "s.tar") == {"s/real": b"real"}


def test_keys_stay_unique_over_folders_globs_and_braces(tmp_path: Path) -> None:
    for folder in "ab":
        for number in range(3):
            pack(tmp_path / folder / f"{number:03d}.tar", [("x.jpg", f"{folder}{number}".encode())])
    assert list(contents(tmp_path / "*" / "*.tar")) == [f"{f}/{n:03d}/x" for f in "ab" for n in range(3)]
    assert list(contents(tmp_path / "{b,a}" / "{001..002}.tar")) == ["b/001/x", "b/002/x", "a/001/x", "a/002/x"]
    assert list(contents(tmp_path / "a")) == ["000/x", "001/x", "002/x"], "a folder of tars"
    (tmp_path / "a" / "index.json").touch()
    assert contents([tmp_path / "a", tmp_path / "b" / "000.tar"])["b/000/x"] == b"b0"
    with pytest.raises(SourceError, match="no such file"):
        listing(tmp_path / "a" / "{000..003}.tar")


def test_duplicate_keys_give_both_places(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", [("x.jpg", b"1"), ("y.jpg", b"2"), ("x.jpg", b"3")])
    with pytest.raises(
        SourceError, match=r"'s/x': first in s\.tar \(offset 512, length 1\), again in s\.tar \(offset 2560"
    ):
        listing(path)
    with pytest.raises(SourceError, match=r"'s/x': first in s\.tar \(offset 512"):
        listing([path, path])


def test_image_and_label_can_be_chosen(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", [("x.left.jpg", b"L"), ("x.right.jpg", b"R"), ("x.species", b"7"), ("x.cls", b"1")])
    with pytest.raises(
        SourceError, match=r"expected one image a sample, found 'x\.left\.jpg' at offset 512, .*data\.image"
    ):
        listing(path)
    assert contents(path, image="right.jpg") == {"s/x": b"R"}
    assert contents(path, image="png; .left.jpg") == {"s/x": b"L"}
    assert listing(path, image="left.jpg", label="species")["label"].to_pylist() == [7]
    with pytest.raises(SourceError, match=r"hold no member with \.png .*found \.cls, \.left\.jpg"):
        listing(path, image="png")
    with pytest.raises(ConfigError, match=r"data\.key"):
        listing(path, key="x")


def test_a_named_label_that_no_image_has_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", SMALL)
    message = r"no member with \.clss \(data\.label\) .* found \.cls, \.jpg, \.png, \.txt"
    for limit in (None, 1):
        with pytest.raises(SourceError, match=message):
            listing(path, label="clss", limit=limit)
    assert listing(path, label="clss;cls")["label"].to_pylist() == [3, 12, None]
    assert listing(path, label=False)["label"].to_pylist() == [None] * 3


def test_label_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", [("x.jpg", b"1"), ("x.cls", b"tabby cat")])
    with pytest.raises(
        SourceError, match=r"s\.tar: member 'x\.cls' at offset 1536: expected a class number, found b'tabby"
    ):
        listing(path)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tar_is_refused(tmp_path: Path, mode: str) -> None:
    for name in (f"s.tar.{mode}", "s.tar"):
        with tarfile.open(tmp_path / name, f"w:{mode}") as tar:  # type: ignore[call-overload]
            tar.addfile(tarfile.TarInfo("x.jpg"))
        with pytest.raises(SourceError, match=r"is compressed .*; expected an uncompressed tar"):
            listing(tmp_path / name)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", SMALL)
    data = path.read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512  # the first end-of-archive block
    for length in [*range(0, end, 256), end + 1, end + 512, end + 1023]:
        path.write_bytes(data[:length])
        with pytest.raises(SourceError, match=r"s\.tar: .*at offset \d+"):
            listing(path)
    path.write_bytes(data[: end + 1024])
    assert len(listing(path)) == 3


def test_truncation_names_the_member_that_is_cut(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", [("a.jpg", b"A" * 5000), ("b.jpg", b"B" * 5000)])
    path.write_bytes(path.read_bytes()[: 512 + 5120 + 512 + 1000])
    with pytest.raises(
        SourceError, match=r"s\.tar: is truncated or corrupt: the tar ends 4000 bytes too early at offset 5632"
    ):
        listing(path)


@pytest.mark.parametrize("at", [0, 100, 124, 148, 156, 512 * 3 + 130, 512 * 3 + 257])
def test_flipped_header_is_found(tmp_path: Path, at: int) -> None:
    path = pack(tmp_path / "s.tar", SMALL)
    data = bytearray(path.read_bytes())
    data[at] ^= 0x41
    path.write_bytes(data)
    with pytest.raises(SourceError, match=f"the header is corrupt at offset {at // 512 * 512}"):
        listing(path)


def test_hole_and_joined_tars_are_found(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", SMALL)
    data = path.read_bytes()
    path.write_bytes(data[:1536] + bytes(2048) + data[1536 + 2048 :])
    with pytest.raises(SourceError, match="data after the end of the archive"):
        listing(path)
    path.write_bytes(data + data)
    with pytest.raises(SourceError, match=f"data after the end of the archive .* at offset {len(data)}"):
        listing(path)


def test_names_files_that_are_not_a_tar(tmp_path: Path) -> None:
    for data in (b"", b"<html>not found</html>", b"\xff\xd8\xff" + bytes(5000)):
        (tmp_path / "s.tar").write_bytes(data)
        with pytest.raises(SourceError, match=r"s\.tar: is not a tar"):
            listing(tmp_path / "s.tar")


def test_tar_that_changed_since_planning_is_an_error_not_a_masked_row(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", [("a.jpg", b"A" * 900), ("b.jpg", b"B" * 900)])
    source = open_source(Data(str(path)))
    table = listed(source)
    pack(path, [("other.jpg", b"C" * 100), ("a.jpg", b"A" * 900), ("b.jpg", b"B" * 900)])
    with pytest.raises(SourceError, match=r"s\.tar \(key 's/a'\): expected a member of 900 bytes at offset 512"):
        source_reader(source.spec).read(table)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(
        SourceError, match=r"s\.tar \(key 's/a'\): expected 2948 bytes at offset 0, found 1000: it shrank"
    ):
        source_reader(source.spec).read(table)
    path.unlink()
    with pytest.raises(SourceError, match=r"s\.tar \(key 's/b'\): no such file"):
        source_reader(source.spec).read(table.slice(1))


def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", [(f"{i}.jpg", f"a{i}".encode() * i * 900) for i in range(9)])
    pack(tmp_path / "b.tar", [(f"{i}.jpg", f"b{i}".encode()) for i in range(9)])
    source = open_source(Data(str(tmp_path)))
    table = listed(source)
    reader = pickle.loads(pickle.dumps(source_reader(source.spec)))
    for order in ([3, 17, 0, 3, 9, 8], list(range(17, -1, -1)), []):
        found = reader.read(table.take(pa.array(order, pa.int64())))
        assert found == [reader.read(table.slice(i, 1))[0] for i in order]
    assert reader.read(table.take([3, 12])) == [b"a3" * 2700, b"b3"]


def test_other_file_systems(tmp_path: Path) -> None:
    system: Any = fsspec.filesystem("memory")
    for number in range(3):
        data = pack(tmp_path / "s.tar", [("x.jpg", b"x" * number), ("y.jpg", b"y")]).read_bytes()
        system.pipe_file(f"/shards/{number:02d}.tar", data)
    try:
        for source in ("memory://shards", "memory://shards/{00..02}.tar", "memory://shards/*.tar"):
            assert list(contents(source)) == ["00/x", "00/y", "01/x", "01/y", "02/x", "02/y"]
        assert contents("memory://shards/02.tar") == {"02/x": b"xx", "02/y": b"y"}
        with pytest.raises(SourceError, match=r"memory:///shards/03\.tar: no such file|cannot be read"):
            listing("memory://shards/{02..03}.tar")
    finally:
        system.rm("/shards", recursive=True)


def test_real_shards(shared_data: Path) -> None:
    source = open_source(Data(str(shared_data / "data/imagenet-sample/sample-{000000..000003}.tar")))
    table = listed(source)
    assert table.num_rows == 200
    assert table["key"][0].as_py() == "sample-000000/n01440764"
    assert table["label"].to_pylist() == sorted(table["label"].to_pylist())
    found = source_reader(source.spec).read(table)
    assert all(data.startswith(b"\xff\xd8\xff") and data.rstrip(b"\0").endswith(b"\xff\xd9") for data in found)
