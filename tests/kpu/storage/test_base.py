"""What every kind of storage promises, run on a local folder, on S3 over HTTP, and on fsspec's memory."""

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kpu.errors import CorruptError, NotACacheError, StorageError
from kpu.storage.base import Storage
from kpu.storage.leases import lease
from kpu.storage.open import location_exists, open_storage

RUN = "run-1"


@pytest.fixture(params=["local", "s3", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    url = {
        "local": lambda: str(tmp_path / "my.kpu"),
        "s3": lambda: f"{request.getfixturevalue('s3_bucket')}/{secrets.token_hex(4)}/my.kpu",
        "memory": lambda: f"memory://{secrets.token_hex(4)}/my.kpu",
    }[request.param]()
    opened = open_storage(url, create=True)
    with lease(opened, RUN):
        yield opened


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_is_published_can_be_read(storage: Storage, kind: type) -> None:
    data = bytes(range(256)) * 41
    assert storage.publish("teachers/t/patch/c/0/0/0", kind(data), run=RUN) is True
    assert storage.read("teachers/t/patch/c/0/0/0") == data
    assert storage.size("teachers/t/patch/c/0/0/0") == len(data)


def test_an_empty_object_is_an_object(storage: Storage) -> None:
    assert storage.publish("a/empty", b"", run=RUN)
    assert (storage.size("a/empty"), storage.read("a/empty")) == (0, b"")
    handle = storage.open("a/empty")
    assert (handle.size, handle.read(0, 0)) == (0, b"")


def test_a_taken_name_is_refused_and_keeps_its_content(storage: Storage) -> None:
    assert storage.publish("plan.json", b"first", run=RUN) is True
    assert storage.publish("plan.json", b"second, and longer", run=RUN) is False
    assert storage.read("plan.json") == b"first"


def test_of_many_threads_one_wins_a_name(storage: Storage) -> None:
    def publish(number: int) -> bool:
        return storage.publish("commits/000000.json", b"%d" % number * 1000, run=RUN)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(publish, range(8)))
    assert won.count(True) == 1
    assert storage.read("commits/000000.json") == b"%d" % won.index(True) * 1000


def test_absent_objects(storage: Storage) -> None:
    storage.publish("teachers/t/zarr.json", b"{}", run=RUN)
    for key in ("nothing", "teachers/nothing", "no/folder/nothing", "teachers/t/zarr.json/below"):
        assert storage.size(key) is None, key
        for look in (storage.open, storage.read):
            with pytest.raises(FileNotFoundError):
                look(key)
    assert list(storage.names("no/folder")) == []


def test_names_lists_one_folder(storage: Storage) -> None:
    for key in ("t/commits/000000.json", "t/commits/000001.json", "t/zarr.json", "t/patch/c/0/0", "u/zarr.json"):
        storage.publish(key, b"x", run=RUN)
    assert sorted(storage.names("t")) == ["commits", "patch", "zarr.json"]
    assert sorted(storage.names("t/commits")) == ["000000.json", "000001.json"]
    storage.publish("t/commits/000002.json", b"x", run=RUN)
    assert len(list(storage.names("t/commits"))) == 3, "a listing is never a remembered one"


def test_handle_reads_ranges(storage: Storage) -> None:
    data = secrets.token_bytes(10_000)
    storage.publish("shard", data, run=RUN)
    handle = storage.open("shard")
    assert handle.size == 10_000
    assert handle.read(0, 10_000) == data
    assert handle.read(9_990, 10) == data[9_990:]
    assert handle.read(1234, 1) == data[1234:1235]
    for offset, length in ((9_990, 11), (10_000, 1), (20_000, 5)):
        with pytest.raises(CorruptError, match=r"shard: ends before byte"):
            handle.read(offset, length)
    handle.close()
    handle.close()
    with pytest.raises(StorageError, match="after close"):
        handle.read(0, 1)


def test_replace_overwrites_below_runs_alone(storage: Storage) -> None:
    for data in (b"first", b"second"):
        storage.replace("runs/1.json", data, run=RUN)
        assert storage.read("runs/1.json") == data
    with pytest.raises(StorageError, match="only objects below runs/"):
        storage.replace("plan.json", b"x", run=RUN)
    assert storage.size("plan.json") is None


def test_quarantine_frees_the_name_and_keeps_the_bytes(storage: Storage) -> None:
    key = "teachers/t/patch/c/3/0/0"
    storage.publish(key, b"bad", run=RUN)
    storage.quarantine(key, run=RUN)
    assert storage.size(key) is None
    assert storage.read(f".tmp/quarantine/{RUN}/{key}") == b"bad"
    assert storage.publish(key, b"good", run=RUN) is True
    storage.quarantine("not/there", run=RUN)
    storage.quarantine(key, run=RUN)
    assert storage.publish(key, b"third time", run=RUN) is True


def test_remove_deletes_below_tmp_alone(storage: Storage) -> None:
    storage.publish("plan.json", b"x", run=RUN)
    storage.quarantine("plan.json", run=RUN)
    storage.publish("plan.json", b"xyz", run=RUN)
    assert storage.remove(".tmp/quarantine") == 1
    assert storage.remove(".tmp/quarantine") == 0
    for folder in (".tmp", "teachers", "", ".tmp/../teachers", "/"):
        with pytest.raises(StorageError):
            storage.remove(folder)
    assert storage.read("plan.json") == b"xyz"


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a/", "a\0b"])
def test_keys_stay_inside_the_cache(storage: Storage, key: str) -> None:
    with pytest.raises(StorageError, match="key"):
        storage.publish(key, b"x", run=RUN)
    with pytest.raises(StorageError, match="key"):
        storage.read(key)
    with pytest.raises(StorageError, match="key"):
        storage.publish("fine", b"x", run=f"../{RUN}")


def test_opening_nothing_names_the_path(tmp_path: Path) -> None:
    assert not location_exists(tmp_path / "absent")
    assert location_exists(tmp_path)
    assert location_exists("s3://anywhere/at/all")
    with pytest.raises(NotACacheError, match=r"absent: expected the folder of a cache, found nothing"):
        open_storage(tmp_path / "absent")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotACacheError, match="found a file"):
        open_storage(tmp_path / "file")


def test_file_urls_are_folders(tmp_path: Path) -> None:
    assert open_storage(f"file://{tmp_path}").url == str(tmp_path)
