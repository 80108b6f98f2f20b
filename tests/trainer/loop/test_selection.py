"""Which weights a training keeps, when it validates and stops, and what it says of a training that teaches nothing."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kpu.errors import CorruptError
from tests.trainer.conftest import Configure
from tests.trainer.loop.test_fit import stopped, told
from trainer.config import TrainConfig
from trainer.evaluation.evaluate import evaluate
from trainer.loop.fit import fit
from trainer.loop.selection import Selection, overall_r2, validation_interval
from trainer.loop.training import Training
from trainer.loop.world import World

WORSE = {"optim": {"epochs": 12, "lr": 0.03, "warmup": 0.0}, "validate_every": 4, "log": {"every": 50, "checkpoint": 8}}


@pytest.fixture
def _spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step after the 20th makes the model worse."""
    advance = Training.advance

    def spoil(self: Training, batches: Any, *, measure: bool) -> Any:
        losses = advance(self, batches, measure=measure)
        if self.step > 20:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(1.05)
        return losses

    monkeypatch.setattr(Training, "advance", spoil)


def validations(path: Path) -> dict[int, float]:
    return {line["step"]: overall_r2(line["validation"]) for line in told(path) if "validation" in line}


@pytest.mark.usefixtures("_spoiled")
def test_the_best_weights_are_kept_and_the_last_beside_them(configure: Configure, tmp_path: Path) -> None:
    summary = fit(configure(**WORSE), tmp_path / "run").summary
    seen = validations(tmp_path / "run")
    best = max(seen, key=lambda step: seen[step])
    assert best <= 24 < summary["steps"]
    figures = summary["weights"]
    assert figures["kept"] == "best" and figures["best"] == {"step": best, "r2": pytest.approx(seen[best])}
    assert figures["last"]["step"] == summary["steps"] and figures["last"]["r2"] < seen[best]
    assert overall_r2(summary["validation"]) == pytest.approx(seen[best])
    checkpoint = load_file(sorted((tmp_path / "run/checkpoints").iterdir())[-1] / "model.safetensors")
    last = load_file(tmp_path / "run/last.safetensors")
    assert all(torch.equal(last[name], checkpoint[name]) for name in last)
    assert not (tmp_path / "run/best").exists()
    assert overall_r2(evaluate(tmp_path / "run")) == pytest.approx(seen[best], abs=1e-4)


@pytest.mark.usefixtures("_spoiled")
def test_the_last_weights_are_kept_on_demand(configure: Configure, tmp_path: Path) -> None:
    chosen = fit(configure(**WORSE), tmp_path / "best")
    last = fit(configure(**WORSE, keep="last"), tmp_path / "last")
    assert last.summary["weights"] == {**chosen.summary["weights"], "kept": "last"}
    for ours, theirs in (("model", "last"), ("best", "model")):
        file = last.path / f"{ours}.safetensors"
        assert file.read_bytes() == (chosen.path / f"{theirs}.safetensors").read_bytes()


@pytest.mark.usefixtures("_spoiled")
@pytest.mark.parametrize("step", [6, 22, 30])
def test_a_stopped_training_resumes_to_the_same_choice_and_the_same_early_stop(
    step: int, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(**WORSE, patience=2)
    whole = fit(config, tmp_path / "whole").summary
    seen = validations(tmp_path / "whole")
    assert whole["steps"] == whole["weights"]["best"]["step"] + 8 == max(seen)
    stopped(config, tmp_path / "run", step, monkeypatch)
    assert fit(config, tmp_path / "run", resume=True).summary["weights"] == whole["weights"]
    for name in ("model", "last"):
        assert len({(tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("run", "whole")}) == 1


@pytest.mark.usefixtures("_spoiled")
def test_damaged_best_weights_are_never_kept(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(**WORSE)
    stopped(config, tmp_path / "run", 30, monkeypatch)
    (best,) = (tmp_path / "run/best").iterdir()
    data = (best / "model.safetensors").read_bytes()
    (best / "model.safetensors").write_bytes(data[:-8] + bytes(8))
    with pytest.raises(CorruptError, match=rf"{best.name}/model.safetensors"):
        fit(config, tmp_path / "run", resume=True)


def test_a_link_is_no_best_state(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (tmp_path / "away/scores.json").write_text('{"step": 1, "r2": 0.9, "digests": {}}')
    (tmp_path / "best").mkdir()
    (tmp_path / "best/step-000000001").symlink_to(tmp_path / "away")
    world = World(0, 1, torch.device("cpu"), "fp32")
    assert Selection(configure(), world, tmp_path / "best", 10, np.arange(2)).best is None


def test_validation_is_frequent_enough_and_cheap_enough(configure: Configure) -> None:
    config = configure(batch_size=256)
    assert validation_interval(config, 2000, 0) is None
    assert validation_interval(config, 2000, 100) == 100
    assert validation_interval(config, 200_000, 4096) == 10_000
    assert validation_interval(config, 100, 4096) == 160  # the end of a training is validated in any case
    assert validation_interval(configure(validate_every=7), 2000, 4096) == 7


def test_a_validation_without_a_number_is_never_the_best(configure: Configure, tmp_path: Path) -> None:
    class Alone:
        def agree(self, value: bool) -> bool:
            return value

    selection = Selection(configure(patience=2), Alone(), tmp_path, 10, [0, 1])  # type: ignore[arg-type]
    nan = {"teachers": {"general": {"r2_global": math.nan}}}
    for step in (1, 2):
        assert not selection.exhausted
        selection.offer(step, nan, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    assert selection.exhausted and selection.best is None


def notes(config: TrainConfig, out: Path) -> list[str]:
    """What is noted, all of it before the first step."""
    seen: list[dict[str, Any]] = []
    fit(config, out, watch=seen.append)
    begun = next(number for number, line in enumerate(seen) if "loss" in line)
    assert "begin" in seen[0] and not any("note" in line for line in seen[begun:])
    return [line["note"] for line in seen[:begun] if "note" in line]


def test_small_trainings_are_doubted_before_they_begin(
    configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        none, few = notes(configure(batch_size=64, optim={"epochs": 1}, validation=0.0), tmp_path / "one")
    assert none.startswith("no row is held back for validation") and "raise validation" in none
    assert few.startswith("only 1 steps: 1 epochs of 70 rows, 64 rows a step") and "lower batch_size" in few
    assert not [record for record in caplog.records if "schedul" in record.getMessage()]
    (rough,) = notes(configure(optim={"epochs": 20}, validation=0.1), tmp_path / "two")
    assert rough.startswith("only ") and rough.endswith("R2 on so few is rough; raise validation")


def test_a_run_of_an_older_release_has_its_last_weights(configure: Configure, tmp_path: Path) -> None:
    run = fit(configure(keep="last"), tmp_path / "run").path
    summary = json.loads((run / "summary.json").read_text())
    for key in ("weights", "digest"):
        del summary[key]
    summary["digests"] = {"model.safetensors": summary["digests"]["model.safetensors"]}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "best.safetensors").unlink(missing_ok=True)
    assert overall_r2(evaluate(run)) == pytest.approx(overall_r2(summary["validation"]), abs=1e-4)
