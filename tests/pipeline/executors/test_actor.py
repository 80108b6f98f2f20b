"""What a worker inside an actor says of its machine."""

import pickle
from pathlib import Path
from socket import gethostname

import pytest

from kpu.errors import TeacherError
from kpu.sources import open_source
from pipeline.config import ExtractConfig, validate_config
from pipeline.executors.actor import ActorWorker
from pipeline.extract import extract
from pipeline.run.reports import Task
from pipeline.teachers import ship
from pipeline.worker.worker import WorkerSetup
from tests.support.toys import write_images, write_teacher


def actor(config: ExtractConfig) -> ActorWorker:
    shipped = {name: ship(teacher) for name, teacher in config.teachers.items()}
    return ActorWorker(WorkerSetup(config, shipped, open_source(config.data).spec, "run"), 1)


def test_what_goes_wrong_on_one_machine_says_on_which(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 5)
    teacher = {"model": f"{write_teacher(tmp_path)}:toy"}
    values = {"data": {"source": str(images)}, "out": str(tmp_path / "o.kpu"), "teachers": {"t": teacher}}
    config = validate_config(values, "the test")
    assert extract(config).complete
    (tmp_path / "o.kpu/teachers/t/commits/000000.json").unlink()
    away = images.rename(tmp_path / "away")
    away.joinpath("keep").touch()
    worker = actor(config.model_copy(update={"data": config.data.model_copy(update={"source": str(away)})}))
    worker.load()
    away.rename(images)
    (failure,) = worker.extract(Task(0, ("t",))).failures
    assert failure.reason.endswith(f" (on {gethostname()})")

    lacking = actor(
        validate_config({**values, "teachers": {"t": {**teacher, "weights": str(tmp_path / "no.pth")}}}, "t")
    )
    with pytest.raises(TeacherError, match=r"no\.pth.* \(on ") as caught:
        lacking.load()
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert str(again).count(gethostname()) == 1
