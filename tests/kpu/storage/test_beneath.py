"""What others put into a cache leads nowhere: links, pipes, devices and files of absurd size are refused by name."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from kpu.errors import CorruptError, LinkError, StorageError
from kpu.reading.cache import open_cache
from kpu.storage import beneath
from kpu.storage.leases import collect_garbage, dead_runs, lease
from kpu.storage.local import LocalStorage
from kpu.storage.open import open_storage
from kpu.tools.repair import repair
from kpu.tools.status import status
from kpu.tools.verify import verify
from tests.support.builders import SmallCache

ROOT = Path(__file__).parents[3]


@pytest.fixture(params=["openat2", "walk"])
def opener(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to open without following links."""
    if request.param == "walk":
        monkeypatch.setattr(beneath, "_opener", lambda: None)
    elif beneath._opener() is None:
        pytest.skip("this system has no openat2")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the user's with files that must still be there at the end."""
    folder = tmp_path / "outside"
    for name in ("a/deep/photo.jpg", "b/notes.txt", "commits/000000.json", "step-000000001/model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"precious")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lead(path: Path, target: Path) -> None:
    """Put a link where `path` is."""
    if path.exists():
        path.rename(path.with_name(path.name + "-moved"))
    path.symlink_to(target)


@pytest.mark.usefixtures("opener")
def test_garbage_collection_deletes_nothing_behind_a_link(small_cache: SmallCache, outside: Path) -> None:
    before = contents(outside)
    lead(small_cache.path / ".tmp", outside)
    storage = open_storage(small_cache.path)
    for attempt in (lambda: collect_garbage(storage, quarantine=True), lambda: dead_runs(storage)):
        with pytest.raises(LinkError, match=r"found the symbolic link \.tmp .*which is not followed") as caught:
            attempt()
        assert caught.value.exit_code == 2
    with pytest.raises(LinkError), lease(storage, "run"):
        pass
    with pytest.raises(LinkError):
        open_storage(small_cache.path, create=True)
    with pytest.raises(LinkError):
        storage.remove(".tmp/quarantine")
    assert contents(outside) == before
    assert sorted(path.name for path in outside.iterdir()) == ["a", "b", "commits", "step-000000001"]


@pytest.mark.parametrize("place", ["quarantine", "dead", "dead/inner", "dead/lease"])
@pytest.mark.usefixtures("opener")
def test_links_within_the_temporary_folder_lead_nowhere(small_cache: SmallCache, outside: Path, place: str) -> None:
    before, link = contents(outside), small_cache.path / ".tmp" / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside / "b/notes.txt" if place.endswith("lease") else outside)
    storage = open_storage(small_cache.path)
    try:
        collect_garbage(storage, quarantine=True)
    except LinkError as error:
        assert place in str(error) or place == "dead/lease"
    assert contents(outside) == before
    if place == "dead/inner":
        assert not (small_cache.path / ".tmp/dead").exists(), "the link itself is garbage"


@pytest.mark.parametrize(
    "place",
    [
        *("runs", "teachers", "teachers/alpha", "teachers/alpha/commits", "images", "images/commits", "samples"),
        *("plan.json", "zarr.json", "teachers/alpha/commits/000000.json"),
    ],
)
@pytest.mark.usefixtures("opener")
def test_a_link_in_a_cache_is_refused_by_name(small_cache: SmallCache, outside: Path, place: str) -> None:
    before, path = contents(outside), small_cache.path / place
    moved = small_cache.path.parent / "moved"
    path.rename(moved) if path.exists() else moved.mkdir()
    path.symlink_to(moved)
    found = []
    for use in (status, lambda path: str(verify(path).problems), lambda path: str(repair(path, dry_run=True).left)):
        try:
            found.append(str(use(small_cache.path)))
        except LinkError as error:
            found.append(str(error))
    assert any(f"symbolic link {place} " in each for each in found), found
    storage = open_storage(small_cache.path)
    below = place if "." in place else f"{place}/x.json"
    for attempt in (storage.read, storage.open, storage.size):
        with pytest.raises(LinkError, match=f"symbolic link {place} "):
            attempt(below)
    assert contents(outside) == before


@pytest.mark.usefixtures("opener")
def test_nothing_is_written_behind_a_link(tmp_path: Path, outside: Path) -> None:
    before, root = contents(outside), tmp_path / "my.kpu"
    storage = open_storage(root, create=True)
    with lease(storage, "r"):
        for name in ("teachers", "runs"):
            (root / name).symlink_to(outside)
        with pytest.raises(LinkError, match="symbolic link teachers"):
            storage.publish("teachers/a/x", b"x", run="r")
        with pytest.raises(LinkError, match="symbolic link runs"):
            storage.replace("runs/1.json", b"x", run="r")
        with pytest.raises(LinkError, match="symbolic link teachers"):
            storage.quarantine("teachers/b/notes.txt", run="r")
    assert contents(outside) == before


@pytest.mark.usefixtures("opener")
def test_a_cache_may_be_named_by_a_link(small_cache: SmallCache, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(small_cache.path)
    assert open_cache(tmp_path / "link").path == str(tmp_path / "link")
    assert verify(tmp_path / "link").ok
    assert collect_garbage(open_storage(tmp_path / "link"), quarantine=True) == 0


@pytest.mark.parametrize(
    "key", ["plan.json", "images/commits/000000.json", "samples/part-000000.parquet", "runs/r.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
@pytest.mark.usefixtures("opener")
def test_pipes_and_devices_are_refused_without_waiting(small_cache: SmallCache, key: str, kind: str) -> None:
    path = small_cache.path / key
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    make_special(path, kind)
    storage = open_storage(small_cache.path)
    found: list[BaseException] = []

    def use() -> None:
        for attempt in (storage.read, storage.open):
            try:
                attempt(key)
            except LinkError as error:
                found.append(error)

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "it waits for the other end"
    assert len(found) == 2
    assert all(f"a regular file {key}" in str(error) for error in found)
    assert storage.size(key) is None


def make_special(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with tempfile.TemporaryDirectory() as short:  # the path of a socket has 107 bytes at most
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(f"{short}/s")
            shutil.move(f"{short}/s", path)
    else:
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("making a device needs root")


def test_a_document_of_absurd_size_is_not_read(small_cache: SmallCache) -> None:
    os.truncate(small_cache.path / "plan.json", 2**40)
    with pytest.raises(CorruptError, match=r"plan.json: holds 1,099,511,627,776 bytes: expected at most"):
        open_cache(small_cache.path)


def test_an_object_is_read_up_to_a_limit(small_cache: SmallCache) -> None:
    storage = LocalStorage(small_cache.path)
    with pytest.raises(CorruptError, match="holds 5 bytes: expected at most 4"):
        (small_cache.path / "five").write_bytes(b"12345")
        storage.read("five", limit=4)
    assert storage.read("five", limit=5) == b"12345"


def test_folders_nested_without_end_are_refused(small_cache: SmallCache) -> None:
    deep = small_cache.path / ".tmp/dead"
    deep.joinpath(*["d"] * 200).mkdir(parents=True)
    with pytest.raises(StorageError, match="more than 64 folders within one another"):
        collect_garbage(open_storage(small_cache.path), quarantine=False)


def test_commands_end_with_one_message_and_code_2(small_cache: SmallCache, outside: Path) -> None:
    before = contents(outside)
    lead(small_cache.path / ".tmp", outside)
    command = [sys.executable, "-c", "from cli.cache import app; app()", "gc", str(small_cache.path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert "found the symbolic link .tmp" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert contents(outside) == before


@pytest.mark.usefixtures("opener")
def test_a_raced_link_is_not_followed_while_folders_are_removed(tmp_path: Path, outside: Path) -> None:
    """Somebody replaces a folder by a link again and again while it is removed."""
    before, root = contents(outside), tmp_path / "my.kpu"
    storage = open_storage(root, create=True)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for action in (
                lambda: (root / ".tmp/dead/c").mkdir(parents=True),
                lambda: (root / ".tmp/dead/c").rename(root / ".tmp/dead/d"),
                lambda: (root / ".tmp/dead/c").symlink_to(outside),
                lambda: (root / ".tmp/dead/c").unlink(),
            ):
                _try(action)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(300):
            _try(lambda: storage.remove(".tmp/dead"))
    finally:
        stop.set()
        thread.join()
    assert contents(outside) == before


def _try(action: Callable[[], object]) -> None:
    with suppress(OSError, StorageError):
        action()
