"""What a run leaves behind for programs and people."""

import json
from pathlib import Path
from typing import Any

import pytest

from kpu.records.leftout import LeftOut
from kpu.records.runs import load_runs
from kpu.storage.base import Storage
from kpu.storage.leases import lease
from kpu.storage.open import open_storage
from pipeline.config import ExtractConfig, validate_config
from pipeline.run.records import LINES_PER_PART, Run, new_run_id
from pipeline.run.reports import STAGES, Task, UnitFailure, UnitReport
from tests.support.builders import make_plan

ID = "20200101T000000Z-abcdef"


@pytest.fixture
def config(out: Path) -> ExtractConfig:
    teachers = {"t": {"model": "timm:x"}}
    return validate_config({"data": {"source": "i"}, "out": str(out), "teachers": teachers}, "test")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "o.kpu"


@pytest.fixture
def storage(out: Path) -> Storage:
    return open_storage(out, create=True)


def report(unit: int, *failures: UnitFailure, size: int = 100) -> UnitReport:
    seconds = {"decode": 0.5, "forward": 1.5}
    return UnitReport(Task(unit, ("t", "u")), 64, 2, size, seconds, failures, nonfinite={"t": unit, "u": 0})


def read(path: Path) -> Any:
    return json.loads((path / f"runs/{ID}.json").read_text())


def test_a_complete_run(config: ExtractConfig, storage: Storage, out: Path) -> None:
    left_out = (LeftOut("hidden", 2, ".x"),)
    with lease(storage, ID), Run(storage, ID, config, left_out) as run:
        assert read(out)["status"] == "running"
        plan = make_plan(storage, ID)
        run.started(plan, {"load": 1.2345, "plan": 0.1, "calibrate": 2.0})
        for unit in range(3):
            run.record(report(unit))
        summary = run.finish([])
    assert summary.complete
    assert (summary.rows, summary.bytes, summary.masked, summary.remaining_units) == (192, 300, 6, 0)
    assert summary.nonfinite == {"t": 3}
    document = read(out)
    assert (document["masked"], document["nonfinite"]) == (6, {"t": 3})
    assert (document["status"], document["plan"]) == ("complete", plan.digest)
    assert document["rows"] == 192
    assert document["rows_per_second"] == pytest.approx(192 / document["seconds"], rel=0.5)
    assert document["startup_seconds"] == {"load": 1.234, "plan": 0.1, "calibrate": 2.0}
    assert document["stage_seconds"] == {**dict.fromkeys(STAGES, 0.0), "decode": 1.5, "forward": 4.5}
    assert {"python", "torch", "zarr"} <= document["versions"].keys()
    assert {"name", "pid", "platform", "cpus"} == document["host"].keys()
    assert document["config"] == config.model_dump(mode="json")
    lines = (out / f"runs/{ID}-0000.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"]["unit"] for line in lines] == [0, 1, 2]
    assert [found.id for found in load_runs(storage)] == [ID]
    assert document["left_out"] == [{"reason": "hidden", "count": 2, "example": ".x"}]
    assert load_runs(storage)[0].left_out == summary.left_out == left_out


def test_a_run_with_failures(config: ExtractConfig, storage: Storage, out: Path) -> None:
    with lease(storage, ID), Run(storage, ID, config) as run:
        run.record(report(0, UnitFailure(0, "t", "no"), size=50))  # the other teacher committed
        run.record(report(1, UnitFailure(1, None, "unreadable"), size=0))
        summary = run.finish([Task(0, ("t",)), Task(1, ("t", "u"))])
    assert (summary.complete, summary.rows, summary.remaining_units) == (False, 64, 2)
    document = read(out)
    assert document["status"] == "incomplete"
    assert document["failed"] == [
        {"unit": 0, "teacher": "t", "reason": "no"},
        {"unit": 1, "teacher": None, "reason": "unreadable"},
    ]


def test_an_interrupted_run(config: ExtractConfig, storage: Storage, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt), lease(storage, ID), Run(storage, ID, config) as run:
        run.record(report(0))
        raise KeyboardInterrupt
    document = read(out)
    assert (document["status"], document["rows"]) == ("interrupted", 64)
    assert document["error"].startswith("KeyboardInterrupt")
    assert document["finished"] is not None


def test_the_log_grows_by_parts_that_are_written_once(config: ExtractConfig, storage: Storage, out: Path) -> None:
    with lease(storage, ID), Run(storage, ID, config) as run:
        for unit in range(2 * LINES_PER_PART + 1):
            run.record(report(unit))
        run.finish([])
    parts = sorted((out / "runs").glob(f"{ID}-*.jsonl"))
    lines = [part.read_text().splitlines() for part in parts]
    assert [len(part) for part in lines] == [LINES_PER_PART, LINES_PER_PART, 1]
    assert [json.loads(line)["task"]["unit"] for part in lines for line in part] == list(range(2 * LINES_PER_PART + 1))


def test_run_names_sort_by_start_and_differ() -> None:
    names = [new_run_id() for _ in range(20)]
    assert len(set(names)) == 20
    assert [name[:16] for name in names] == sorted(name[:16] for name in names)
