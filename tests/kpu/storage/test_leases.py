"""Who is alive, who is not, and what is collected."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kpu.errors import StorageError
from kpu.storage.leases import collect_garbage, dead_runs, lease, mutex
from kpu.storage.local import LocalStorage
from kpu.storage.open import open_storage

ROOT = Path(__file__).parents[3]
HOLD = """
import sys, time
from kpu.storage.open import open_storage
from kpu.storage.leases import lease
storage = open_storage(sys.argv[1])
with lease(storage, sys.argv[2]):
    open(f"{sys.argv[1]}/.tmp/{sys.argv[2]}/half-written", "wb").write(b"x" * 1000)
    print("held", flush=True)
    time.sleep(600)
"""

ENTER = """
import sys
from kpu.storage.open import open_storage
from kpu.storage.leases import mutex
storage = open_storage(sys.argv[1])
print("waiting", flush=True)
with mutex(storage):
    print("inside", flush=True)
"""


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    opened = open_storage(tmp_path / "my.kpu", create=True)
    assert isinstance(opened, LocalStorage)
    return opened


def hold(storage: LocalStorage, run: str) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, storage.url, run], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_run_is_alive_until_its_process_dies(storage: LocalStorage) -> None:
    driver = hold(storage, "driver")
    with lease(storage, "own"):
        assert dead_runs(storage) == []
        assert collect_garbage(storage, quarantine=True) == 0
        assert (storage.root / ".tmp/driver/half-written").exists()
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert dead_runs(storage) == ["driver"]
        assert collect_garbage(storage, quarantine=False) == 1000
        assert not (storage.root / ".tmp/driver").exists()
        assert (storage.root / ".tmp/own/lease").exists()
    assert dead_runs(storage) == []


def test_a_folder_without_a_lease_is_dead(storage: LocalStorage) -> None:
    (storage.root / ".tmp/older").mkdir(parents=True)
    assert dead_runs(storage) == ["older"]


def test_what_a_run_left_behind_outlives_its_lease_until_it_is_collected(storage: LocalStorage) -> None:
    with lease(storage, "r"):
        (storage.root / ".tmp/r/left").write_bytes(b"12345")
    assert dead_runs(storage) == ["r"]
    assert collect_garbage(storage, quarantine=False) == 5


def test_quarantine_is_kept_unless_asked_for(storage: LocalStorage) -> None:
    with lease(storage, "r"):
        storage.publish("teachers/t/global/c/0/0", b"1234", run="r")
        storage.quarantine("teachers/t/global/c/0/0", run="r")
    assert dead_runs(storage) == []
    assert collect_garbage(storage, quarantine=False) == 0
    assert collect_garbage(storage, quarantine=True) == 4
    assert not (storage.root / ".tmp/quarantine").exists()


def test_garbage_collection_never_touches_a_final_name(storage: LocalStorage) -> None:
    with lease(storage, "r"):
        storage.publish("plan.json", b"plan", run="r")
        storage.publish("teachers/t/commits/000000.json", b"commit", run="r")
    collect_garbage(storage, quarantine=True)
    assert storage.read("plan.json") == b"plan"
    assert storage.read("teachers/t/commits/000000.json") == b"commit"


def test_one_name_is_leased_once(storage: LocalStorage) -> None:
    with lease(storage, "r"), pytest.raises(StorageError, match="File exists"), lease(storage, "r"):
        pass


@pytest.mark.parametrize("run", ["", "..", "a/../b", "/tmp/x"])
def test_run_names_stay_inside(storage: LocalStorage, run: str) -> None:
    with pytest.raises(StorageError, match="key"), lease(storage, run):
        pass


def test_mutex_excludes_threads(storage: LocalStorage) -> None:
    inside: list[int] = []
    most: list[int] = []

    def enter() -> None:
        for _ in range(20):
            with mutex(storage):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1


def test_mutex_excludes_processes(storage: LocalStorage) -> None:
    with mutex(storage):
        other = subprocess.Popen([sys.executable, "-c", ENTER, storage.url], cwd=ROOT, stdout=subprocess.PIPE)
        assert other.stdout is not None
        assert other.stdout.readline() == b"waiting\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=0.2)
    assert other.stdout.readline() == b"inside\n"
    assert other.wait() == 0


def test_object_stores_need_no_lease() -> None:
    remote = open_storage("memory://leases/my.kpu", create=True)
    with lease(remote, "r"), mutex(remote):
        assert dead_runs(remote) == []
        remote.publish("a", b"12", run="r")
        remote.quarantine("a", run="r")
    assert collect_garbage(remote, quarantine=False) == 0
    assert collect_garbage(remote, quarantine=True) == 2
