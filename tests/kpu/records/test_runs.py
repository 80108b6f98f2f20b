import json
from pathlib import Path

import pytest

from kpu.records.runs import RecordedFailure, latest_run, load_runs
from kpu.storage.open import open_storage


def write(path: Path, name: str, document: object) -> None:
    (path / "runs").mkdir(exist_ok=True)
    text = document if isinstance(document, str) else json.dumps(document)
    (path / "runs" / name).write_text(text)


def test_runs_come_in_the_order_of_their_start(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    assert load_runs(storage) == []
    assert latest_run(storage) is None
    write(tmp_path, "b.json", {"id": "b", "started": "2026-01-01T00:00:00+00:00", "status": "complete", "rows": 7})
    write(tmp_path, "a.json", {"id": "a", "started": "2026-01-02T00:00:00+00:00", "status": "interrupted"})
    write(tmp_path, "a-0000.jsonl", "{}")
    assert [(run.id, run.status, run.rows) for run in load_runs(storage)] == [
        ("b", "complete", 7),
        ("a", "interrupted", 0),
    ]
    assert latest_run(storage).id == "a"


def test_a_run_says_what_failed_and_what_it_was_for(tmp_path: Path) -> None:
    failed = [
        {"teacher": "alpha", "unit": 3, "reason": "NaN in class/x.png"},
        {"unit": 4, "teacher": None, "reason": "gone"},
    ]
    config = {"teachers": {"alpha": {}, "beta": {}}}
    write(tmp_path, "a.json", {"id": "a", "started": "x", "failed": failed, "config": config, "rows_per_second": 3.5})
    (run,) = load_runs(open_storage(tmp_path))
    assert run.failed == (RecordedFailure("alpha", 3, "NaN in class/x.png"), RecordedFailure(None, 4, "gone"))
    assert run.teachers == ("alpha", "beta")
    assert run.rows_per_second == 3.5


@pytest.mark.parametrize(
    "document",
    ["", "{", "[]", "null", {"failed": 3}, {"failed": [1, {}, {"unit": "x"}]}, {"rows": "many", "config": []}],
)
def test_a_file_of_another_making_does_no_harm(tmp_path: Path, document: object) -> None:
    write(tmp_path, "a.json", document)
    found = [(run.id, run.status, run.rows, run.failed, run.teachers) for run in load_runs(open_storage(tmp_path))]
    assert found == ([("a", "running", 0, (), ())] if isinstance(document, dict) else [])
