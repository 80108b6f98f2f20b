"""Which units `retry-failed` tries again, and with which configuration."""

import json
from pathlib import Path

import pytest

from kpu.errors import NotACacheError
from kpu.tools.status import Status, status
from pipeline.retry import failed_runs
from tests.support.builders import build


def write_run(out: Path, name: str, teachers: list[str], *failed: tuple[str | None, int]) -> None:
    document = {
        "id": name,
        "started": name,
        "failed": [{"teacher": teacher, "unit": unit, "reason": "it broke"} for teacher, unit in failed],
        "config": {"teachers": {teacher: {} for teacher in teachers}, "seed": name},
    }
    (out / "runs").mkdir(exist_ok=True)
    (out / f"runs/{name}.json").write_text(json.dumps(document))


def test_each_unit_is_retried_as_the_latest_run_tried_it(tmp_path: Path) -> None:
    out = build(tmp_path / "o.kpu").path
    for teacher, unit in (("alpha", 0), ("alpha", 1), ("beta", 2)):
        (Path(out) / f"teachers/{teacher}/commits/{unit:06d}.json").unlink()
    write_run(Path(out), "1", ["alpha"], ("alpha", 0), ("alpha", 1))
    write_run(Path(out), "2", ["beta"], ("beta", 0), ("beta", 2))  # unit 0 is committed since
    write_run(Path(out), "3", ["alpha"], ("alpha", 1))
    found = failed_runs(str(out))
    assert [(run.id, sorted(units)) for run, units in found] == [("1", [0]), ("2", [2]), ("3", [1])]
    assert found[2][0].config["seed"] == "3"


def test_a_failure_of_all_teachers(tmp_path: Path) -> None:
    out = Path(build(tmp_path / "o.kpu").path)
    (out / "teachers/beta/commits/000001.json").unlink()
    write_run(out, "1", ["alpha", "beta"], (None, 0), (None, 1))
    assert [(run.id, sorted(units)) for run, units in failed_runs(str(out))] == [("1", [1])]


def test_a_failure_that_a_live_run_saves_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(build(tmp_path / "o.kpu").path)
    (out / "teachers/beta/commits/000001.json").unlink()

    def save_before(path: str) -> Status:
        write_run(out, "1", ["beta"], ("beta", 1))
        return status(path)

    monkeypatch.setattr("pipeline.retry.status", save_before)
    assert [(run.id, sorted(units)) for run, units in failed_runs(str(out))] == [("1", [1])]


def test_nothing_failed(tmp_path: Path) -> None:
    assert failed_runs(str(build(tmp_path / "o.kpu").path)) == []
    with pytest.raises(NotACacheError):
        failed_runs(str(tmp_path / "none"))
