"""What a folder of a file system promises beyond any storage: crashes, other processes, full and read-only disks."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kpu.errors import CorruptError, FullDiskError, StorageError, StorageFault
from kpu.storage.leases import collect_garbage, lease
from kpu.storage.local import LocalStorage
from kpu.storage.open import open_storage

ROOT = Path(__file__).parents[3]
DATA = bytes(range(251)) * 400
KEY = "teachers/t/patch/c/7/0/0"

PUBLISH = f"""
import sys
from kpu.storage.open import open_storage
from kpu.storage.leases import lease
storage = open_storage(sys.argv[1])
with lease(storage, sys.argv[2]):
    for line in sys.stdin if len(sys.argv) > 3 else [""]:
        print(storage.publish({KEY!r} + line.strip(), bytes(range(251)) * 400, run=sys.argv[2]), flush=True)
"""


def start(code: str, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_two_processes_never_both_win_a_name(tmp_path: Path) -> None:
    open_storage(tmp_path, create=True)
    racers = [start(PUBLISH, tmp_path, run, "many") for run in ("a", "b")]
    names = "".join(f"{number}\n" for number in range(200))
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write(names)
        racer.stdin.flush()
    results = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert all({first, second} == {"True", "False"} for first, second in zip(*results, strict=True))
    storage = open_storage(tmp_path)
    assert all(storage.read(f"{KEY}{number}") == DATA for number in range(200))


@pytest.mark.parametrize(
    ("failpoint", "stands"),
    [("publish.temporary", False), ("publish.synced", False), ("publish.linked", True), ("publish.done", True)],
)
def test_a_kill_leaves_all_or_nothing(tmp_path: Path, failpoint: str, stands: bool) -> None:
    storage = open_storage(tmp_path, create=True)
    killed = start(PUBLISH, tmp_path, "killed", KPU_FAILPOINT=failpoint)
    output, errors = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, errors
    assert output == ""
    assert storage.size(KEY) == (len(DATA) if stands else None)

    collect_garbage(storage, quarantine=False)
    assert [name for name in files(tmp_path) if not name.endswith(".lock")] == ([KEY] if stands else [])
    with lease(storage, "again"):
        assert storage.publish(KEY, DATA, run="again") is not stands
    assert storage.read(KEY) == DATA


def test_nothing_temporary_is_left_by_a_publish(tmp_path: Path) -> None:
    storage = open_storage(tmp_path, create=True)
    with lease(storage, "r"):
        storage.publish(KEY, DATA, run="r")
        storage.publish(KEY, DATA, run="r")
        assert files(tmp_path / ".tmp/r") == ["lease"]
    assert not (tmp_path / ".tmp/r").exists()


def test_a_run_that_was_declared_dead_cannot_publish(tmp_path: Path) -> None:
    storage = open_storage(tmp_path, create=True)
    with pytest.raises(StorageError, match=r"\.tmp/zombie does not exist: the run holds no lease"):
        storage.publish(KEY, DATA, run="zombie")
    assert storage.size(KEY) is None


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_loses_nothing_that_stands(tiny_disk: Path) -> None:
    storage = open_storage(tiny_disk, create=True)
    with lease(storage, "r"):
        assert storage.publish("first", DATA, run="r")
        with pytest.raises(
            FullDiskError, match=r"cannot write second: No space left on device; free some space"
        ) as hit:
            storage.publish("second", DATA * 3, run="r")
        assert hit.value.exit_code == 1
        assert storage.size("second") is None
        assert storage.read("first") == DATA
        assert storage.publish("second", DATA[:1000], run="r"), "the failed temporary still takes up the space"


def test_a_quota_reads_like_a_full_disk(tmp_path: Path) -> None:
    open_storage(tmp_path, create=True)
    limited = start(
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n" + PUBLISH, tmp_path, "r"
    )
    _, errors = limited.communicate(timeout=60)
    assert "kpu.errors.FullDiskError" in errors
    assert open_storage(tmp_path).size(KEY) is None


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder with one object in it that nobody can write to."""
    folder = tmp_path / "folder"
    folder.mkdir()
    if os.geteuid():
        (folder / "object").write_bytes(DATA)
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("root may write to every folder, and this one may not mount a read-only one")
    (folder / "object").write_bytes(DATA)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_read_only_folder_is_readable_and_says_why_it_is_not_writable(read_only: Path) -> None:
    assert open_storage(read_only).read("object") == DATA
    with pytest.raises(StorageError, match=rf"cannot write {read_only}/.*(Permission denied|Read-only file system)"):
        open_storage(read_only, create=True)
    with pytest.raises(StorageError, match=r"cannot create .*(Permission denied|Read-only file system)"):
        open_storage(read_only / "below", create=True)


def test_creating_where_a_file_stands(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot create"):
        open_storage(tmp_path / "file", create=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="cannot create"):
        open_storage(tmp_path / "dangling", create=True)


def test_creating_makes_parents_and_leaves_no_probe(tmp_path: Path) -> None:
    open_storage(tmp_path / "a/b/my.kpu", create=True)
    open_storage(tmp_path / "a/b/my.kpu", create=True)
    assert files(tmp_path) == ["a/b/my.kpu/.tmp/gc.lock"]


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    storage = open_storage(tmp_path / "link", create=True)
    with lease(storage, "r"):
        storage.publish("object", b"x", run="r")
    assert (tmp_path / "real/object").read_bytes() == b"x"
    assert storage.url == str(tmp_path / "link")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="expected a writable file system with hard links") as caught:
        open_storage(tmp_path / "my.kpu", create=True)
    assert os.strerror(number) in str(caught.value)
    assert caught.value.exit_code == 2
    assert files(tmp_path) == ["my.kpu/.tmp/gc.lock"]


def test_a_link_whose_answer_was_lost_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS sends a request again whose answer it misses, and is told that the name is taken: by itself."""
    storage, link = open_storage(tmp_path, create=True), os.link

    def lost(*arguments: Any, **options: Any) -> None:
        link(*arguments, **options)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    with lease(storage, "r"):
        monkeypatch.setattr(os, "link", lost)
        assert storage.publish("object", b"ours", run="r") is True
        monkeypatch.undo()
        assert storage.publish("object", b"theirs", run="r") is False
    assert storage.read("object") == b"ours"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_failing_disk_ends_with_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    storage = open_storage(tmp_path, create=True)
    with lease(storage, "r"):
        monkeypatch.setattr(os, "fsync", fail)
        for write in (storage.publish, storage.replace):
            with pytest.raises(StorageFault, match=r"cannot write runs/r.json: .*start the same") as caught:
                write("runs/r.json", b"{}", run="r")
            assert caught.value.exit_code == 1
        monkeypatch.undo()
        monkeypatch.setattr(os, "scandir", fail)
        with pytest.raises(StorageFault, match="cannot list"):
            list(storage.names(".tmp"))


def test_a_file_that_shrinks_while_open_is_corrupt(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    (tmp_path / "object").write_bytes(DATA)
    handle = storage.open("object")
    os.truncate(tmp_path / "object", 500)
    assert handle.read(0, 500) == DATA[:500]
    with pytest.raises(CorruptError, match="object: ends before byte 501"):
        handle.read(0, 501)


def test_too_many_open_files_come_with_advice(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, create=True)
    (tmp_path / "file").write_bytes(b"x")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(StorageError) as caught:
            storage.open("file")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert str(caught.value).startswith(f"{tmp_path}: cannot read file: Too many open files; allow")
    assert "`ulimit -n`" in str(caught.value)


def test_handles_close_their_files(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    (tmp_path / "object").write_bytes(DATA)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for number in range(50):
        handle = storage.open("object")
        handle.read(number, 10)
        if number % 2:
            handle.close()
        del handle
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
