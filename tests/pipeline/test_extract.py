"""What an extraction looks up and decodes, and the places it takes."""

import errno
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from threading import Thread, current_thread, main_thread
from typing import Any

import pytest

from kpu.errors import ConfigError, StorageError
from kpu.format.plan import Decoding
from kpu.storage import paths
from kpu.storage.local import LocalStorage
from pipeline.config import ExtractConfig, validate_config
from pipeline.extract import extract
from pipeline.run.observers import Silent
from pipeline.run.reports import UnitReport
from pipeline.worker import loading
from tests.support.toys import kpu, snapshot, write_images, write_teacher

ROWS = 130  # three units, the last one of two rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("extract")
    write_images(place / "images", ROWS)
    write_teacher(place)
    return place


def config(place: Path, out: object, teachers: dict[str, dict[str, Any]] | None = None, **values: Any) -> ExtractConfig:
    model = f"torch:{place}/toy.py"
    named = {
        name: {"model": f"{model}:{name}", **settings}
        for name, settings in (teachers or {"toy": {}, "wider": {}}).items()
    }
    values = {"data": {"source": str(place / "images")}, "out": str(out), "teachers": named, "unit_rows": 64, **values}
    return validate_config(values, "test")


class Noted(Silent):
    """Notes what was asked of `seen` before the first unit, how much was to do, and which units were done."""

    def __init__(self, seen: list[Any]) -> None:
        self._seen = seen
        self.pending, self.before, self.units = 0, list[Any](), list[int]()

    def begin(self, *, total: int, pending: int, workers: int) -> None:  # noqa: ARG002
        self.pending, self.before = pending, list(self._seen)
        self._seen.clear()

    def report(self, report: UnitReport) -> None:
        self.units.append(report.task.unit)


def test_a_commit_is_looked_up_by_the_worker_that_is_given_its_unit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.kpu"
    assert extract(config(place, out)).complete
    commits = {unit: out / paths.commit(paths.teacher("toy"), unit) for unit in range(3)}
    records = {unit: path.read_bytes() for unit, path in commits.items()}
    asked: list[str] = []
    threads: set[Thread] = set()
    size = LocalStorage.size

    def noted(self: LocalStorage, key: str) -> int | None:
        if "/commits/" in key and key.startswith("teachers/"):
            asked.append(key)
            threads.add(current_thread())
        return size(self, key)

    monkeypatch.setattr(LocalStorage, "size", noted)

    class Faster(Noted):
        """Another driver commits unit 0 between the listing and the first task."""

        def begin(self, **numbers: int) -> None:
            super().begin(**numbers)
            commits[0].write_bytes(records[0])

    for path in commits.values():
        path.unlink()
    seen = Faster(asked)
    summary = extract(config(place, out), seen, frozenset({0, 2}))
    assert (seen.pending, seen.before, seen.units) == (64 + 2, [], [2])
    assert {Path(key).stem for key in asked} == {"000000", "000002"}
    assert main_thread() not in threads  # the driver alone would limit a whole cluster
    assert summary.remaining_units == 1
    assert not commits[1].exists()

    seen = Noted(asked)
    assert extract(config(place, out), seen).complete
    assert (seen.pending, seen.units) == (64, [1])


def test_teachers_share_one_decoding(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    decode = loading.Decoded

    def noted(data: bytes, how: Decoding) -> Any:
        decoded.append(data)
        return decode(data, how)

    monkeypatch.setattr(loading, "Decoded", noted)
    teachers = {"toy": {}, "wider": {"input": {"size": 16}}, "poisoned": {"input": {"size": 12}}}
    seen = Noted(decoded)
    assert extract(config(place, tmp_path / "o.kpu", teachers, calibration_rows=20), seen).complete
    images = [path.read_bytes() for path in (place / "images").iterdir()]
    assert Counter(decoded) == Counter(images)
    assert len(seen.before) == len(set(seen.before)) == 20  # by the calibration, also once for all teachers


def test_a_location_that_fails_on_the_way_leaves_work_undone(place: Path, tmp_path: Path) -> None:
    """Not wrong usage: whoever runs the command again where its exit code is 1 gets to the end."""
    out = tmp_path / "o.kpu"
    commits = out / paths.commit(paths.teacher("toy"), 0).rpartition("/")[0]

    class Lost(Silent):
        def report(self, report: UnitReport) -> None:  # noqa: ARG002
            (out / "lost").mkdir(exist_ok=True)
            while not commits.is_file():  # a unit in flight may make the folder again
                with suppress(OSError):
                    for file in commits.iterdir():
                        file.rename(out / "lost" / file.name)
                    commits.rmdir()
                with suppress(FileExistsError):
                    commits.touch(exist_ok=False)

    with pytest.raises(StorageError) as caught:
        extract(config(place, out), Lost())
    assert caught.value.exit_code == 1
    commits.unlink()
    (out / "lost").rename(commits)
    assert extract(config(place, out)).complete


def test_a_file_url_is_a_local_place(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "o%20 1.kpu"
    summary = extract(config(place, f"file://{out}", data={"source": f"file://{place}/images"}))
    assert summary.complete
    assert summary.out == str(out)
    assert os.listdir(tmp_path) == [out.name]  # noqa: PTH208
    assert extract(config(place, f"file://{out}")).rows == 0

    before = snapshot(place)
    with pytest.raises(ConfigError, match="expected a new path, an empty folder or a cache, found a folder with"):
        extract(config(place, f"file://{place}/images"))
    assert snapshot(place) == before


@pytest.mark.parametrize("calls", [4, 12, 20, 30])
def test_a_disk_that_fails_ends_with_code_1_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """EIO from some sync on: while the place is probed, while planning, or on the run's own log."""
    write_images(tmp_path / "images" / "cats", 70)
    write_teacher(tmp_path)
    left, sync = [calls], os.fsync

    def failing(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    ended = kpu("extract", tmp_path / "images", "-t", f"t=torch:{tmp_path}/toy.py:toy", "-o", tmp_path / "o.kpu")
    assert left[0] < 0, "nothing failed"
    assert ended.exit_code == 1, ended.output
    assert "Input/output error" in ended.output
    monkeypatch.undo()
    begun = sorted(path.name for path in (tmp_path / "o.kpu").iterdir()) if (tmp_path / "o.kpu").exists() else []
    assert "teachers" in begun or begun == []
    again = kpu("extract", tmp_path / "images", "-t", f"t=torch:{tmp_path}/toy.py:toy", "-o", tmp_path / "o.kpu")
    assert again.exit_code == 0, again.output
