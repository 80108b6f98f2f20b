"""What a listing passes over is counted by reason, with an example; folders that hold two kinds are refused."""

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest

from kpu.errors import SourceError
from kpu.records.leftout import LeftOut, Tally, describe_left_out
from kpu.sources import open_source
from tests.support.sources import Data, contents, fill, left_out, listed, listing, pack


def test_files_of_a_folder_are_counted_by_ending(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg", "a/b.psd", "a/c.PSD", "d.exr", "n01440764_18", ".DS_Store", "a/._1.jpg", "e.npy")
    fill(tmp_path, ".git/x.jpg")
    assert left_out(tmp_path) == {
        "hidden": (3, ".DS_Store"),
        "with the ending .psd": (2, "a/b.psd"),
        "with the ending .exr": (1, "d.exr"),
        "with the ending .npy": (1, "e.npy"),
        "without an ending": (1, "n01440764_18"),
    }
    source = open_source(Data(str(tmp_path)))
    assert source.classes == ("a",)
    for _ in range(2):  # neither the look for classes nor a second listing counts anything twice
        listed(source)
        assert sum(item.count for item in source.left_out) == 8


def test_links_and_pipes_of_a_folder_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert left_out(tmp_path) == {
        "linked to a folder that holds it": (1, "a/up"),
        "neither file nor folder": (1, "pipe.jpg"),
    }


def test_what_lies_beside_shards_is_counted(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", [("0.jpg", b"0")])
    fill(tmp_path, "index.json", "0.json", ".index.crc")
    (tmp_path / ".cache").mkdir()
    assert {reason: count for reason, (count, _) in left_out(tmp_path).items()} == {
        "with the ending .json": 2,
        "hidden": 2,
    }
    assert left_out(tmp_path / "*") == {"with the ending .json": (2, f"{tmp_path}/0.json")}


def test_shards_and_pictures_in_one_folder_are_refused(tmp_path: Path) -> None:
    for number in range(2):
        pack(tmp_path / f"{number}.tar", [("0.jpg", b"0")])
    fill(tmp_path, "preview.png")
    with pytest.raises(SourceError, match=r"one kind of source, found 0\.tar \(2 shards\) beside preview\.png \(1 im"):
        listing(tmp_path)
    assert list(contents(tmp_path / "*.tar")) == ["0/0", "1/0"]
    assert list(contents(tmp_path / "*.png")) == ["preview.png"]


def test_several_shards_beside_folders_are_refused(tmp_path: Path) -> None:
    for number in range(2):
        pack(tmp_path / f"{number}.tar", [("0.jpg", b"0")])
    fill(tmp_path, "__MACOSX/._0.tar", ".cache/1.jpg")
    assert list(contents(tmp_path)) == ["0/0", "1/0"]
    fill(tmp_path, "previews/1.jpg")
    with pytest.raises(
        SourceError, match=r"found 0\.tar \(2 shards\) beside the folder previews .*/\*\.tar' or '.*previews'"
    ):
        listing(tmp_path)
    assert list(contents(tmp_path / "*.tar")) == ["0/0", "1/0"]
    assert list(contents(tmp_path / "previews")) == ["1.jpg"]


def test_downloads_beside_unpacked_folders_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, "cat/1.jpg", "images.tar.gz", "cat/more.tar")
    pack(tmp_path / "part.tar", [("0.jpg", b"0")])
    assert list(contents(tmp_path)) == ["cat/1.jpg"]
    assert left_out(tmp_path) == {
        "with the ending .tar": (2, "part.tar"),
        "with the ending .gz": (1, "images.tar.gz"),
    }
    fill(tmp_path / "loose", "1.jpg", "images.tar.gz")
    assert list(contents(tmp_path / "loose")) == ["1.jpg"]


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    fill(tmp_path, "1.psd", "2.psd")
    with pytest.raises(SourceError, match=r"holds no image .*; left out: 2 with the ending \.psd \(1\.psd\)"):
        listing(tmp_path)


def test_a_folder_of_save_to_disk_says_how_to_convert_it(tmp_path: Path) -> None:
    fill(tmp_path / "one", "data-00000-of-00001.arrow", "dataset_info.json", "state.json")
    with pytest.raises(SourceError, match=rf"load_from_disk\('{tmp_path}/one'\)\.to_parquet"):
        listing(tmp_path / "one")
    with pytest.raises(SourceError, match=rf"Dataset\.from_file\('{tmp_path}/one/data-0.*arrow'\)\.to_parquet"):
        listing(tmp_path / "one" / "data-00000-of-00001.arrow")
    fill(tmp_path / "both", "dataset_dict.json", "train/data-00000-of-00001.arrow")
    with pytest.raises(SourceError, match=r"/both'\)\['train'\]\.to_parquet"):
        listing(tmp_path / "both")


def test_local_names_with_two_colons(tmp_path: Path) -> None:
    fill(tmp_path, "a::b/c::d.jpg")
    assert contents(tmp_path / "a::b") == {"c::d.jpg": b"a::b/c::d.jpg"}
    pack(tmp_path / "x::y.tar", [("0.jpg", b"0")])
    assert contents(tmp_path / "x::y.tar") == {"x::y/0": b"0"}


def test_keys_of_an_object_store_with_two_slashes_are_refused(s3_bucket: str, tmp_path: Path) -> None:
    system: Any = fsspec.filesystem("s3")
    inner = s3_bucket.removeprefix("s3://")
    system.pipe_file(f"{inner}/slashes/a/1.jpg", b"1")
    system.call_s3("put_object", Bucket=inner, Key="slashes/", Body=b"")  # a folder's marker, as consoles make it
    assert contents(f"{s3_bucket}/slashes") == {"a/1.jpg": b"1"}
    system.call_s3("put_object", Bucket=inner, Key="slashes//2.jpg", Body=b"2")
    system.invalidate_cache()
    with pytest.raises(SourceError, match=r"nothing between two slashes \(.*/slashes//\.\.\.\).* without `//`"):
        listing(f"{s3_bucket}/slashes")
    assert contents(f"{s3_bucket}/slashes/a") == {"1.jpg": b"1"}
    earlier = open_source(Data(f"{s3_bucket}/slashes")).earlier
    assert earlier is not None
    assert listed(earlier)["key"].to_pylist() == ["a/1.jpg"], "a cache that was begun so goes on"
    system.pipe_file(f"{inner}/shards/0.tar", pack(tmp_path / "0.tar", [("0.jpg", b"0")]).read_bytes())
    system.call_s3("put_object", Bucket=inner, Key="shards/", Body=b"")
    assert contents(f"{s3_bucket}/shards") == {"0/0": b"0"}, "beside the folder's marker"
    system.call_s3("put_object", Bucket=inner, Key="shards//1.tar", Body=b"")
    system.invalidate_cache()
    with pytest.raises(SourceError, match="nothing between two slashes"):
        listing(f"{s3_bucket}/shards")


def test_line_and_bounds_of_a_tally() -> None:
    assert describe_left_out([]) == ""
    tally = Tally([LeftOut("hidden", 2, ".x")])
    for number in range(100):
        tally.add_file(f"a/IMG.{number:04d}")
    tally.add("hidden", "y" * 500)
    found = tally.result()
    assert len(found) == 51
    assert sum(item.count for item in found) == 103
    assert found[0] == LeftOut("with other endings", 51, "a/IMG.0049")
    line = describe_left_out(found)
    assert line.startswith("left out: 51 with other endings (a/IMG.0049), 3 hidden (.x), 1 with the ending .0000 (")
    assert line.endswith("43 for 43 other reasons")
    assert describe_left_out([LeftOut("hidden", 1, "a\x1b[2J\n")]) == "left out: 1 hidden ('a\\x1b[2J\\n')"
    assert len(describe_left_out([LeftOut("hidden", 1, "y" * 500)])) < 120
