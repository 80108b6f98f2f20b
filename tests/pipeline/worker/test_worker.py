"""What a worker refuses: teachers that it loads otherwise than the cache says, and more than its device holds."""

import socket
from pathlib import Path
from typing import Any

import pytest

from kpu.errors import TeacherError
from kpu.sources import open_source
from pipeline.config import ExtractConfig, validate_config
from pipeline.extract import extract
from pipeline.run.reports import Task
from pipeline.teachers import ship
from pipeline.worker.worker import Worker, WorkerSetup
from tests.support.toys import write_images, write_teacher

FULL = """
import torch


class Full(Toy):
    def to(self, *arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More of this.")


def full():
    return Full()
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", 5)
    write_teacher(tmp_path)
    return tmp_path


def config(place: Path, factory: str = "toy", **teacher: Any) -> ExtractConfig:
    teachers = {"t": {"model": f"torch:{place}/toy.py:{factory}", **teacher}}
    values = {"data": {"source": str(place / "images")}, "out": str(place / "o.kpu"), "teachers": teachers}
    return validate_config(values, "the test")


def worker(config: ExtractConfig) -> Worker:
    shipped = {name: ship(teacher) for name, teacher in config.teachers.items()}
    return Worker(WorkerSetup(config, shipped, open_source(config.data).spec, "run"), 1)


def test_a_teacher_that_another_machine_loads_otherwise_commits_nothing(place: Path) -> None:
    """The driver compares what one worker says; the others may have other packages, or no working GPU."""
    assert extract(config(place)).complete
    commit = place / "o.kpu/teachers/t/commits/000000.json"
    commit.unlink()
    other = worker(config(place, input={"mean": [0.4, 0.5, 0.5]}))
    try:
        report = other.extract(Task(0, ("t",)))
    finally:
        other.close()
    (failure,) = report.failures
    assert f"teacher 't' was loaded otherwise on {socket.gethostname()} than the cache was begun with" in failure.reason
    assert "input.mean: expected [0.5, 0.5, 0.5], found [0.4, 0.5, 0.5]" in failure.reason
    assert not commit.exists()


def test_teachers_that_a_device_does_not_hold_are_a_message(place: Path) -> None:
    with (place / "toy.py").open("a") as file:
        file.write(FULL)
    with pytest.raises(TeacherError, match=r"teachers t: .* do not fit into the device's memory together.*2 GiB"):
        extract(config(place, "full"))
    assert not (place / "o.kpu").exists()
