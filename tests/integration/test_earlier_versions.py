"""Caches, runs and exports of earlier versions open, verify, train and load; `tests/fixtures` keeps one of each.

`cache` and its conversion `tars` hold toy teachers `general` and `big` over 120 images; `run` is a side student of
three epochs on them, and `exported` that student. `expected.npz` is what that version read and gave.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import kpu
from kpu.tools.status import status
from kpu.tools.verify import verify
from trainer.run.runs import RunFolder

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSIONS = sorted(path.name for path in FIXTURES.iterdir())


@pytest.fixture(params=VERSIONS)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of what a version left."""
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / request.param))


@pytest.mark.parametrize("name", ["cache", "tars"])
def test_caches_give_the_same_features(kept: Path, name: str) -> None:
    cache, expected = kpu.open_cache(kept / name), np.load(kept / "expected.npz")
    outputs = [key for key in expected.files if key.startswith(("general.", "big."))]
    assert len(outputs) == 4
    for key in outputs:
        assert cache.read(*key.split("."), expected["rows"]).tobytes() == expected[key].tobytes()
    report = verify(kept / name)
    assert report.ok and report.files > 10
    assert status(kept / name).complete


def test_runs_are_evaluated_alike_and_resume(kept: Path) -> None:
    expected = json.loads((kept / "evaluated.json").read_text())
    found = kpu.evaluate(kept / "run", [str(kept / "cache")])
    assert set(found["teachers"]) == {"general", "big"}
    config = RunFolder(kept / "run").config().model_copy(update={"caches": (str(kept / "cache"),)})
    summary = kpu.fit(config, kept / "run", resume=True).summary
    assert summary["steps"] == json.loads((kept / "run/summary.json").read_text())["steps"] > 0
    own = kpu.evaluate(kept / "run")
    assert own["teachers"]["big"]["agreement"] == expected["agreement"]
    assert own["linear_probe"] == expected["probe"]


def test_a_student_is_trained_on_an_old_cache(kept: Path, tmp_path: Path) -> None:
    config = {
        "caches": [str(kept / "cache")],
        "base": "general",
        "student": {"width": 8, "depth": 1},
        "optim": {"epochs": 1},
        "batch_size": 16,
        "validation": 0.2,
    }
    assert kpu.fit(config, tmp_path / "run").summary["steps"] > 0


def test_exported_students_load_and_give_the_same(kept: Path) -> None:
    student, expected = kpu.load_student(kept / "exported", trust_code=True), np.load(kept / "expected.npz")
    answer = student([np.full((8, 8, 3), value, np.uint8) for value in (0, 90, 200)])
    np.testing.assert_allclose(answer["global"].detach().numpy(), expected["student.global"], rtol=1e-5, atol=1e-6)


def test_code_of_an_export_does_not_run_unasked(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KPU_TRUSTED_CODE", str(kept / "trusted-code"))  # other tests may trust the same toy
    with pytest.raises(kpu.TrustError, match=r"base_model\.py"):
        kpu.load_student(kept / "exported")
