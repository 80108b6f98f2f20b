"""Folders of images: order, labels, odd names, and reading what may have changed since."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from kpu.errors import ConfigError, SourceError
from kpu.sources import files, open_source, source_reader
from tests.support.sources import Data, contents, fill, listed, listing


def keys(source: Any, **options: Any) -> list[str]:
    found: list[str] = listing(source, **options)["key"].to_pylist()
    return found


def test_order_is_sorted_names_depth_first(tmp_path: Path) -> None:
    fill(tmp_path, "b/2.jpg", "b/10.jpg", "b/a/x.png", "a.jpg", "c.jpg", "a/z.jpg", "B/1.jpg")
    expected = ["B/1.jpg", "a/z.jpg", "a.jpg", "b/10.jpg", "b/2.jpg", "b/a/x.png", "c.jpg"]
    assert keys(tmp_path) == expected
    table = listing(tmp_path)
    assert table["file"].to_pylist() == expected
    assert table.schema.field("key").nullable is False


def test_subfolders_are_classes_by_sorted_name(tmp_path: Path) -> None:
    fill(tmp_path, "zebra/1.jpg", "cat/deep/2.jpg", "cat/1.jpg", "loose.jpg")
    (tmp_path / "empty").mkdir()
    fill(tmp_path, "notes/readme.txt", ".hidden/3.jpg")
    source = open_source(Data(str(tmp_path)))
    assert source.classes == ("cat", "zebra")
    rows = {row["key"]: row["label"] for row in listed(source).to_pylist()}
    assert rows == {"cat/1.jpg": 0, "cat/deep/2.jpg": 0, "zebra/1.jpg": 1, "loose.jpg": None}


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = open_source(Data(str(fill(tmp_path, "1.jpg", "2.PNG"))))
    assert source.classes is None
    assert listed(source)["label"].to_pylist() == [None, None]
    assert listed(source).schema.field("label").type == pa.int64()


def test_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    fill(tmp_path, "1.jpg", ".2.jpg", "3.txt", "jpg", "4.jpg.part", "5.JPEG", "6.webp")
    assert keys(tmp_path) == ["1.jpg", "5.JPEG", "6.webp"]


@pytest.mark.parametrize(
    "name", ["a b.jpg", "ça/é ü.jpg", "日本/猫.jpg", "new\nline.jpg", "a..jpg", "a'\"*?[x].jpg", "%20.jpg"]
)
def test_odd_names_are_kept_and_read(tmp_path: Path, name: str) -> None:
    fill(tmp_path, name, "plain.jpg")
    assert contents(tmp_path)[name] == name.encode()


def test_names_that_are_not_unicode_are_kept_apart_and_read(tmp_path: Path) -> None:
    for name in (b"caf\xe9.jpg", b"caf\xe8.jpg"):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(name)
    assert contents(tmp_path) == {"caf\\xe8.jpg": b"caf\xe8.jpg", "caf\\xe9.jpg": b"caf\xe9.jpg"}


def test_linked_folders_are_followed_but_not_round_in_circles(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "1.jpg")
    root = fill(tmp_path / "root", "a/2.jpg")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "up").symlink_to(root)
    (root / "self").symlink_to(".")
    assert keys(root) == ["a/2.jpg", "linked/1.jpg"]


def test_link_to_nothing_is_named(tmp_path: Path) -> None:
    (fill(tmp_path, "1.jpg") / "2.jpg").symlink_to("gone.jpg")
    with pytest.raises(SourceError, match=r"2\.jpg: is a link to gone\.jpg"):
        listing(tmp_path)


def test_several_folders_share_a_root_and_their_classes(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "val/cat/1.jpg", "val/bee/3.jpg", "other/x.jpg")
    source = open_source(Data([str(tmp_path / "val"), str(tmp_path / "train")]))
    assert source.spec.root == str(tmp_path)
    assert source.classes == ("bee", "cat", "dog")
    rows = [(row["key"], row["label"]) for row in listed(source).to_pylist()]
    assert rows == [("val/bee/3.jpg", 0), ("val/cat/1.jpg", 1), ("train/cat/1.jpg", 1), ("train/dog/2.jpg", 2)]
    assert contents([tmp_path / "val", tmp_path / "train"])["val/bee/3.jpg"] == b"val/bee/3.jpg"


def test_globs_and_braces_of_files_and_folders(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg", "c/1.jpg", "b/readme.md")
    assert keys(tmp_path / "*" / "1.jpg") == ["a/1.jpg", "b/1.jpg", "c/1.jpg"]
    assert keys(tmp_path / "{c,a}") == ["c/1.jpg", "a/1.jpg", "a/2.jpg"]
    assert keys(tmp_path / "b" / "*") == ["1.jpg"]
    fill(tmp_path, "{x}[1]/1.jpg")
    assert keys(tmp_path / "{x}[1]") == ["1.jpg"], "a path that exists is no pattern"


def test_a_source_named_twice_gives_both_places(tmp_path: Path) -> None:
    fill(tmp_path, "a/b/1.jpg")
    with pytest.raises(SourceError, match=r"duplicate key 'a/b/1\.jpg': first in a/b/1\.jpg, again in a/b/1\.jpg"):
        listing([tmp_path / "a", tmp_path / "a" / "b", tmp_path])


def test_limit(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{i}.jpg" for i in range(9)))
    assert keys(tmp_path, limit=3) == ["0.jpg", "1.jpg", "2.jpg"]
    assert len(keys(tmp_path, limit=100)) == 9


def test_what_cannot_be_a_source_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "full/1.jpg", "data/sub/x.parquet", "notes.txt", "x.tar", "y.parquet")
    (tmp_path / "empty").mkdir()
    for source, message in [
        (tmp_path / "empty", "holds no image"),
        (tmp_path / "data", "shards in sub-folders are named by a pattern"),
        (tmp_path / "gone" / "deeper", f"no such file or folder \\(what exists is {tmp_path}\\)"),
        (tmp_path / "notes.txt", "expected a folder, a .tar, a .parquet or an image"),
        (tmp_path / "*.jpeg", "no file matches"),
        (tmp_path / "{a", "no such file or folder|braces"),
        ([tmp_path / "x.tar", tmp_path / "y.parquet"], "expected one kind of source"),
        ([], "empty list"),
        ("nosuch://bucket/x", "nosuch"),
    ]:
        with pytest.raises(SourceError, match=message):
            listing(source)
    for option in ("image", "label", "key"):
        with pytest.raises(ConfigError, match=f"data.{option}: expected null, found 'x'"):
            listing(tmp_path / "full", **{option: "x"})


def test_file_that_is_gone_or_locked_is_an_error_not_a_masked_row(tmp_path: Path) -> None:
    source = open_source(Data(str(fill(tmp_path, "1.jpg", "2.jpg"))))
    table = listed(source)
    (tmp_path / "2.jpg").unlink()
    reader = source_reader(source.spec)
    assert reader.read(table.slice(0, 1)) == [b"1.jpg"]
    with pytest.raises(SourceError, match=r"2\.jpg: no such file"):
        reader.read(table)


def test_reader_never_leaves_the_root(tmp_path: Path) -> None:
    fill(tmp_path, "secret.jpg", "root/1.jpg")
    source = open_source(Data(str(tmp_path / "root")))
    for file in ("../secret.jpg", "a/../../secret.jpg", str(tmp_path / "secret.jpg")):
        table = pa.table({"key": ["k"], "file": [file]})
        with pytest.raises(SourceError, match="outside"):
            source_reader(source.spec).read(table)


def test_empty_file_gives_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").touch()
    assert contents(tmp_path) == {"1.jpg": b""}


def test_reader_can_be_pickled_and_forked(tmp_path: Path) -> None:
    source = open_source(Data(str(fill(tmp_path, "1.jpg"))))
    reader, table = source_reader(source.spec), listed(source)
    assert reader.read(table) == [b"1.jpg"]
    assert pickle.loads(pickle.dumps(reader)).read(table) == [b"1.jpg"]
    child = os.fork()
    if child == 0:
        os._exit(0 if reader.read(table) == [b"1.jpg"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    for name in ("cat/1.jpg", "cat/.no.jpg", "dog/a b.jpg", "dog/2.txt"):
        system.pipe_file(f"/images/{name}", name.encode())
    yield system
    system.rm("/images", recursive=True)


def test_other_file_systems(memory: Any) -> None:
    source = open_source(Data("memory://images"))
    assert source.classes == ("cat", "dog")
    assert [(row["key"], row["label"]) for row in listed(source).to_pylist()] == [("cat/1.jpg", 0), ("dog/a b.jpg", 1)]
    assert contents("memory://images") == {"cat/1.jpg": b"cat/1.jpg", "dog/a b.jpg": b"dog/a b.jpg"}
    assert keys(["memory://images/dog", "memory://images/cat"]) == ["dog/a b.jpg", "cat/1.jpg"]
    assert keys("memory://images/*/1.jpg") == ["1.jpg"]
    table = listed(source)
    memory.rm("/images/cat/1.jpg")
    with pytest.raises(SourceError, match=r"cat/1\.jpg: no such file"):
        source_reader(source.spec).read(table)
    with pytest.raises(SourceError, match="no such folder"):
        listing("memory://nothing/here")


class Flaky(MemoryFileSystem):  # type: ignore[misc]
    """Memory that fails its first reads, as object stores do."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012
    failures = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> Any:
        if Flaky.failures > 0:
            Flaky.failures -= 1
            raise TimeoutError("slow down")
        return super().cat_file(path, start, end, **kwargs)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://")))


def test_reads_that_may_pass_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "DELAYS", (0.01, 0.01))
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    fsspec.filesystem("flaky").pipe_file("/d/1.jpg", b"one")
    fsspec.filesystem("flaky").pipe_file("/d/2.jpg", b"two")
    source = open_source(Data("flaky://d"))
    table, reader = listed(source), source_reader(source.spec)
    Flaky.failures = 3
    assert reader.read(table) == [b"one", b"two"]
    Flaky.failures = 100
    with pytest.raises(
        SourceError, match=r"d/1\.jpg: 3 attempts to read it failed, the last with TimeoutError: slow down"
    ):
        reader.read(table)
