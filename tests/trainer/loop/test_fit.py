"""Whole trainings in this process: what they keep, that they learn, and that they resume exactly."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kpu.errors import ConfigError, MismatchError, SourceError, TrainingError
from tests.support.toys import snapshot
from tests.trainer.conftest import COLLAPSED, Configure
from trainer.config import TrainConfig
from trainer.data.images import ImageReader
from trainer.loop import fit as loop
from trainer.loop.fit import fit
from trainer.loop.training import Training
from trainer.run.runs import RunFolder

SPEED = ("rows_per_second", "data_wait")  # what differs between two equal trainings


class Stop(Exception):
    pass


def told(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without what the clock says."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEED} for line in lines]


def assert_same(path: Path, reference: Path) -> None:
    """Both runs logged the same figures and keep the same model."""
    assert told(path) == told(reference)
    assert (path / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


def stopped(config: TrainConfig, out: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until `step` is done, then stop at once."""
    steps = iter(range(1, 1000))

    def stop(name: str) -> None:
        if name == "train.step" and next(steps) == step:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(loop, "failpoint", stop)
        with pytest.raises(Stop):
            fit(config, out)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": {"optim": {"ema": 40.0}},
    "accumulate": {"optim": {"accumulate": 2, "epochs": 4}},
    "pretrained": {"unify": {"mode": "pretrained"}, "balance": {"name": "dropping"}},
    "joint": {"unify": {"mode": "joint"}, "preserve": {"weight": 1.0}},
    "pca": {"unify": {"mode": "pca"}, "order": {"name": "windowed", "window": 1}},
    "untrained": {"unify": {"mode": "untrained"}, "student": {"merge": "concat"}},
    "images": {"student": {"kind": "full", "model": "{place}/toy.py:toy", "weights": "random"}},
}


@pytest.mark.usefixtures("any_space")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_training_ends_as_if_it_had_not_stopped(
    configure: Configure, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    changes = json.loads(json.dumps(VARIANTS[variant]).replace("{place}", f"torch:{place}"))
    config = configure(**changes)
    whole = fit(config, tmp_path / "whole")
    assert whole.summary["steps"] > 6
    for step in (1, 2, 5) if variant == "plain" else (5,):
        out = tmp_path / f"stopped-{step}"
        stopped(config, out, step, monkeypatch)
        resumed = configure(**changes, loader={"threads": 1 + step % 3, "ahead": step})
        summary = fit(resumed, out, resume=True).summary
        assert_same(out, tmp_path / "whole")
        assert summary["validation"] == whole.summary["validation"]
        assert summary["position"] == whole.summary["position"]


def test_a_training_learns_and_keeps_what_it_says(configure: Configure, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    config = configure(optim={"epochs": 40}, log={"every": 20, "checkpoint": 1000}, teachers=["general", "big"])
    fitted = fit(config, tmp_path / "run", watch=seen.append)
    losses = [line["loss"] for line in seen if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    summary = fitted.summary
    assert summary["train_rows"] + summary["validation_rows"] == 70
    assert summary["steps"] == 40 * summary["train_rows"] // 16
    assert summary["rows"] == 16 * summary["steps"]
    scores = summary["validation"]["teachers"]
    assert scores["big"]["r2_patch"] > 0.5  # a linear map of the same pixels' neighbours
    assert RunFolder(tmp_path / "run").summary() == summary
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "sources.json", "statistics.safetensors", "model.safetensors", "tensorboard"} <= names
    assert not [name for name in names if name.startswith(".")]
    checkpoint = load_file(sorted((tmp_path / "run/checkpoints").iterdir())[-1] / "model.safetensors")
    last = "model" if summary["weights"]["kept"] == "last" else "last"
    model = load_file(tmp_path / f"run/{last}.safetensors")
    assert all(torch.equal(model[name], checkpoint[name]) for name in model)


def test_batches_do_not_depend_on_the_teachers(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[list[int]]] = {}
    advance = Training.advance

    def noting(self: Training, batches: Any, *, measure: bool) -> Any:
        seen.setdefault(str(self.config.teachers), []).extend(batch.rows.tolist() for batch in batches)
        return advance(self, batches, measure=measure)

    monkeypatch.setattr(Training, "advance", noting)
    for number, teachers in enumerate((None, ["general"], ["shy", "general"])):
        fit(configure(teachers=teachers), tmp_path / str(number))
    first, *others = seen.values()
    assert len(seen) == 3
    assert all(other == first for other in others)
    assert len(np.unique(np.concatenate(first))) > 60


def test_a_damaged_last_checkpoint_is_passed_over(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()
    fit(config, tmp_path / "whole")
    stopped(config, tmp_path / "run", 5, monkeypatch)
    last = sorted((tmp_path / "run/checkpoints").iterdir())[-1] / "state.pt"
    data = bytearray(last.read_bytes())
    data[100] ^= 255
    last.write_bytes(data)
    fit(config, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(configure: Configure, tmp_path: Path) -> None:
    summary = fit(configure(), tmp_path / "run").summary
    before = snapshot(tmp_path / "run")
    assert fit(configure(), tmp_path / "run", resume=True).summary == summary
    after = snapshot(tmp_path / "run")
    assert {name for name in after if after[name] != before.get(name)} <= {"environment.json"}


def test_teachers_that_came_later_do_not_join_a_run(
    configure: Configure, toys: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.toys import kpu

    cache = Path(shutil.copytree(toys, tmp_path / "c.kpu"))
    config = configure(caches=[str(cache)])
    fit(config, tmp_path / "whole")
    stopped(config, tmp_path / "run", 3, monkeypatch)
    late = ["-t", f"late=torch:{place}/toy.py:toy", "--set", "allow_nonfinite=true", "--set", "executor.threads=1"]
    result = kpu("extract", place / "images", *late, "--set", "unit_rows=64", "-o", cache)
    assert result.exit_code == 0, result.output
    fit(config, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_collapsed_space_is_refused(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=COLLAPSED):
        fit(configure(unify={"mode": "pretrained", "steps": 1}), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "the next attempt may have the same folder"


def test_a_joint_space_is_gated_before_anything_is_kept(configure: Configure, tmp_path: Path) -> None:
    config = configure(unify={"mode": "joint", "lowest_rank": 1.0})  # all directions alike: no space has that
    with pytest.raises(MismatchError, match=r"'big'.*effective rank of at least"):
        fit(config, tmp_path / "run")
    assert not any((tmp_path / "run/checkpoints").iterdir())
    assert not (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize("mode", ["pretrained", "joint"])
def test_a_space_that_weighs_nothing_is_neither_learned_nor_gated(
    configure: Configure, tmp_path: Path, mode: str
) -> None:
    seen: list[dict[str, Any]] = []
    fit(configure(unify={"mode": mode, "weight": 0}), tmp_path / "run", watch=seen.append)
    fit(configure(), tmp_path / "off")
    assert not any("space_step" in line for line in seen)
    assert_same(tmp_path / "run", tmp_path / "off")


@pytest.mark.parametrize("mode", ["pretrained", "joint", "pca", "untrained"])
def test_a_space_of_the_base_alone_has_nothing_to_learn(configure: Configure, tmp_path: Path, mode: str) -> None:
    config = configure(teachers=["general"], unify={"mode": mode})
    stands = fit(config, tmp_path / "run").summary
    assert fit(config, tmp_path / "run", resume=True).summary == stands
    assert told(tmp_path / "run")[0]["t2s"].keys() == {"general"}


@pytest.mark.usefixtures("any_space")
@pytest.mark.parametrize("mode", ["pretrained", "joint"])
def test_no_image_is_read_for_the_shared_space(
    configure: Configure, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    rows: list[int] = []
    load = ImageReader.load

    def counted(self: ImageReader, wanted: np.ndarray) -> Any:
        rows.append(len(wanted))
        return load(self, wanted)

    monkeypatch.setattr(ImageReader, "load", counted)
    read = {}
    for each in ("off", mode):
        rows.clear()
        summary = fit(configure(student=images_student(place, "full"), unify={"mode": each}), tmp_path / each).summary
        read[each] = sum(rows)
    assert read[mode] == read["off"] >= summary["rows"]
    figures = json.loads((tmp_path / mode / "space.json").read_text())
    assert 0 < figures["big/global/floor"] < figures["big/global/chance"]
    assert not (tmp_path / "off/space.json").exists()


def test_a_loss_that_is_not_finite_ends_the_training_and_no_checkpoint_is_made_of_it(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(log={"every": 100, "checkpoint": 3})
    advance = Training.advance

    def poisoned(self: Training, batches: Any, *, measure: bool) -> Any:
        if self.step == 4:
            with torch.no_grad():
                next(self.model.projectors.parameters()).fill_(torch.nan)
        return advance(self, batches, measure=measure)

    monkeypatch.setattr(Training, "advance", poisoned)
    with pytest.raises(TrainingError, match="step 6: expected a finite loss"):
        fit(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000000003"]
    assert not (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"batch_size": 500}, "batch_size: expected at most"),
        ({"targets": {"source": "live"}}, "targets.source"),
        ({"outputs": ["patch"], "targets": {"normalize": "phi-s"}, "teachers": ["general", "big"]}, None),
        ({"targets": {"normalize": "phi-s"}, "base": "big"}, "10 for each of 9 channels"),
        ({"workers": 2}, "workers: expected as many as there are processes, 1"),
    ],
)
def test_bad_configurations_make_no_run(
    configure: Configure, tmp_path: Path, changes: dict[str, Any], fragment: str | None
) -> None:
    if fragment is None:
        fit(configure(**changes), tmp_path / "run")
        return
    with pytest.raises(ConfigError) as raised:
        fit(configure(**changes), tmp_path / "run")
    assert fragment in str(raised.value)
    assert not (tmp_path / "run").exists()


def images_student(place: Path, kind: str) -> dict[str, Any]:
    return {"kind": kind, "model": f"torch:{place}/toy.py:toy", "weights": "random"}


def test_images_that_moved_are_found_at_another_root(configure: Configure, place: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(place / "images", moved)
    student = images_student(place, "full")
    fit(configure(student=student), tmp_path / "here")
    fit(configure(student=student, images={"root": str(moved)}), tmp_path / "there")
    assert_same(tmp_path / "there", tmp_path / "here")
    with pytest.raises(ConfigError, match=r"images\.root: expected the folder"):
        fit(configure(student=student, images={"root": str(tmp_path / "nowhere")}), tmp_path / "run")


@pytest.mark.parametrize(("change", "error"), [("other bytes", MismatchError), ("gone", SourceError)])
def test_images_that_changed_are_refused(
    configure: Configure, place: Path, tmp_path: Path, change: str, error: type[Exception]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(place / "images", moved)
    for path in moved.iterdir():
        path.unlink() if change == "gone" else path.write_bytes(path.read_bytes() + b" ")
    config = configure(student=images_student(place, "full"), images={"root": str(moved)})
    with pytest.raises(error, match=r"images\.root|expected the image"):
        fit(config, tmp_path / "run")


def test_two_trainings_at_once_in_one_folder(configure: Configure, tmp_path: Path) -> None:
    config = configure(log={"every": 1, "checkpoint": 1})
    refused: list[str] = []

    def again(_: dict[str, Any]) -> None:
        if not refused:
            with pytest.raises(ConfigError, match="locked by another process") as caught:
                fit(config, tmp_path / "run", resume=True)
            refused.append(str(caught.value))

    fit(config, tmp_path / "run", watch=again)
    fit(config, tmp_path / "whole")
    assert refused
    assert_same(tmp_path / "run", tmp_path / "whole")
