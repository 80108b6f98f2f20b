"""Caches where a file that is removed while it is open stays under another name, as on NFS; shown on bindfs (FUSE).

With `hard_remove` FUSE removes it at once. Skipped where bindfs cannot be mounted (Debian's package bindfs, /dev/fuse).
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kpu.errors import SourceError
from kpu.reading.cache import open_cache
from kpu.storage.leases import collect_garbage, lease
from kpu.storage.open import open_storage
from kpu.tools.verify import verify
from pipeline.target import cleanup_on_failure
from tests.support.builders import build, make_plan
from tests.support.toys import kpu, write_images, write_teacher


@pytest.fixture(params=["renames", "removes"])
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder behind bindfs."""
    if shutil.which("bindfs") is None or shutil.which("fusermount") is None:
        pytest.skip("bindfs is not installed")
    behind, folder = tmp_path / "behind", tmp_path / "mount"
    behind.mkdir()
    folder.mkdir()
    options = ["-o", "hard_remove"] if request.param == "removes" else []
    mounted = subprocess.run(["bindfs", *options, behind, folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"bindfs cannot be mounted: {mounted.stderr.strip()}")
    try:
        if request.param == "renames":
            (folder / "sample").mkdir()
            with (folder / "sample/open").open("w"):
                (folder / "sample/open").unlink()
                assert [path.name[:12] for path in (folder / "sample").iterdir()] == [".fuse_hidden"]
            (folder / "sample").rmdir()
        yield folder
    finally:
        subprocess.run(["fusermount", "-u", "-z", folder], check=True)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_cache_is_made_and_read(mount: Path) -> None:
    out = mount / "my.kpu"
    build(out)
    assert verify(out).ok
    assert open_cache(out).rows
    assert names(out / ".tmp") == ["gc.lock"]
    open_storage(out, create=True)
    assert names(out / ".tmp") == ["gc.lock"]


def test_what_a_dead_run_has_open_elsewhere_waits_for_the_next_collection(mount: Path) -> None:
    storage = open_storage(mount / "my.kpu", create=True)
    dead = mount / "my.kpu/.tmp/dead"
    dead.mkdir()
    with (dead / "half-written").open("wb") as file:
        file.write(b"x" * 1000)
        file.flush()
        assert collect_garbage(storage, quarantine=True) == 1000
        with lease(storage, "next"):
            assert storage.publish("object", b"x", run="next")
    collect_garbage(storage, quarantine=True)
    assert names(mount / "my.kpu") == [".tmp", ".tmp/gc.lock", "object"]


@pytest.mark.parametrize("deep", [False, True])
def test_a_failed_start_leaves_nothing(mount: Path, deep: bool) -> None:
    out = mount / "deep/my.kpu" if deep else mount
    with pytest.raises(SourceError), cleanup_on_failure(str(out)) as created:
        storage = open_storage(out, create=True, created=created)
        with lease(storage, "mine"):
            make_plan(storage, "mine")
            storage.replace("runs/mine.json", b"{}", run="mine")
            raise SourceError("no images")
    assert names(mount) == []


def test_an_open_shard_may_be_moved_aside_and_collected(mount: Path) -> None:
    storage = open_storage(mount / "my.kpu", create=True)
    with lease(storage, "r"):
        storage.publish("teachers/t/global/c/0/0", b"1234", run="r")
        handle = storage.open("teachers/t/global/c/0/0")
        storage.quarantine("teachers/t/global/c/0/0", run="r")
        assert collect_garbage(storage, quarantine=True) == 4
        handle.close()
        del handle
    assert collect_garbage(storage, quarantine=True) in (0, 4)
    assert names(mount / "my.kpu/.tmp") == ["gc.lock"]
    assert os.listdir(mount / "my.kpu/teachers/t/global/c/0") == []  # noqa: PTH208


def test_commands_work_there(mount: Path, tmp_path: Path) -> None:
    write_teacher(tmp_path)
    images, out = write_images(tmp_path / "images" / "cats", 20), mount / "my.kpu"
    command = ("extract", images.parent, "-t", f"t=torch:{tmp_path}/toy.py:toy", "-o", out)
    for _ in range(2):
        ended = kpu(*command)
        assert ended.exit_code == 0, ended.output
    for command in (("verify", out), ("gc", out), ("export", out, mount / "tars.kpu"), ("repair", out)):
        ended = kpu(*command)
        assert ended.exit_code == 0, (command, ended.output)
    assert names(out / ".tmp") == ["gc.lock"]
    assert not [name for name in names(mount) if ".fuse_hidden" in name]
