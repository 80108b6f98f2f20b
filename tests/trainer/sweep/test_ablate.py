"""Sweeps: their cells, their table against a worked example, and trainings that are done once."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import ttest_rel
from typer.testing import CliRunner

from kpu.errors import ConfigError, IncompleteError, MismatchError
from tests.support.toys import snapshot
from tests.trainer.conftest import Extract, small_config
from trainer.config import TrainConfig
from trainer.loop.fit import Fitted
from trainer.run.runs import RunFolder
from trainer.sweep import ablate as ablation
from trainer.sweep.ablate import ablate, compare, run_trial
from trainer.sweep.sweeps import Sweep, load_sweep


def write_sweep(folder: Path, toys: Path, **changes: Any) -> Path:
    values = {
        "config": small_config(toys, optim={"epochs": 1}, log={"every": 2, "checkpoint": 2}),
        "grid": {"unify.mode": ["off", "untrained"]},
        "seeds": [0, 4],
        "out": str(folder / "sweep"),
        "executor": "inline",
        **changes,
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_the_grid_is_a_product_and_lies_over_the_configuration(toys: Path, tmp_path: Path) -> None:
    grid = {"optim.lr": [0.1, 0.2], "teachers": [["general"], None]}
    sweep = load_sweep(write_sweep(tmp_path, toys, grid=grid))
    assert [tuple(cell.values()) for cell in sweep.cells] == [
        (0.1, ["general"]),
        (0.1, None),
        (0.2, ["general"]),
        (0.2, None),
    ]
    assert [(trial.name, trial.config.optim.lr, trial.config.seed) for trial in sweep.trials][2:5] == [
        ("001-lr-0.1-teachers-null-seed0", 0.1, 0),
        ("001-lr-0.1-teachers-null-seed4", 0.1, 4),
        ("002-lr-0.2-teachers-general-seed0", 0.2, 0),
    ]
    assert all(trial.config.optim.epochs == 1 for trial in sweep.trials)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"grid": {"optim.rate": [1]}}, "optim.rate"),
        ({"grid": {"optim.lr": [0.1, -1]}}, "optim.lr"),
        ({"grid": {"optim.lr": []}}, "grid"),
        ({"grid": {"seed": [1, 2]}}, "as seeds"),
        ({"grid": {"optim.lr": [0.1, 0.1]}}, "optim.lr=0.1"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"seeds": []}, "seeds"),
        ({"cells": 3}, "cells"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(
    toys: Path, tmp_path: Path, changes: dict[str, Any], fragment: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load_sweep(write_sweep(tmp_path, toys, **changes))
    assert fragment in str(raised.value)


def test_paired_differences_against_a_worked_example(toys: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, toys, seeds=[0, 1, 2, 3], grid={"optim.lr": [0.1, 0.2, 0.3]})
    sweep = load_sweep(file)
    values = np.random.default_rng(0).normal(size=(3, 4))
    figures = [{"a": float(values[trial.cell, trial.seed])} for trial in sweep.trials]
    rows = compare(sweep, figures)
    assert [row.cell for row in rows] == ["optim.lr=0.1", "optim.lr=0.2", "optim.lr=0.3"]
    assert rows[0].difference is None
    for cell in (1, 2):
        expected = ttest_rel(values[cell], values[0]).confidence_interval(0.95)
        assert rows[cell].difference == pytest.approx((values[cell] - values[0]).mean())
        assert (rows[cell].low, rows[cell].high) == pytest.approx((expected.low, expected.high))


def test_one_seed_has_no_interval(toys: Path, tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path, toys, seeds=[3]))
    row = compare(sweep, [{"a": 1.0}, {"a": 3.0}])[1]
    assert (row.difference, row.low, row.high) == (2.0, None, None)


def test_a_figure_that_only_later_cells_have_is_in_the_table(toys: Path, tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path, toys, seeds=[3]))
    rows = compare(sweep, [{"a": 1.0}, {"a": 3.0, "b": 2.0}])
    assert [(row.figure, row.mean) for row in rows[:2]] == [("a", 1.0), ("a", 3.0)]
    assert [row.figure for row in rows[2:]] == ["b", "b"]
    assert math.isnan(rows[2].mean) and rows[3].mean == 2.0
    assert rows[3].difference is not None and math.isnan(rows[3].difference)


@pytest.mark.parametrize("executor", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_every_training_is_done_once(toys: Path, tmp_path: Path, executor: str) -> None:
    sweep = load_sweep(write_sweep(tmp_path, toys, executor=executor))
    found = ablate(sweep)
    names = [trial.name for trial in sweep.trials]
    assert {path.name for path in sweep.out.iterdir()} == {*names, "ablation.json"}
    for trial in sweep.trials:
        summary = json.loads((sweep.out / trial.name / "summary.json").read_text())
        assert summary["steps"] > 0
    general = [row for row in found.rows if row.figure == "general global"]
    scores = [
        json.loads((sweep.out / name / "summary.json").read_text())["validation"]["teachers"]["general"]["r2_global"]
        for name in names
    ]
    assert general[0].mean == pytest.approx(np.mean(scores[:2]))
    assert general[1].difference == pytest.approx(np.mean(scores[2:]) - np.mean(scores[:2]))
    assert json.loads((sweep.out / "ablation.json").read_text()) == found.as_json()
    before = snapshot(sweep.out)
    assert ablate(sweep) == found
    changed = {name for name, value in snapshot(sweep.out).items() if value != before[name]}
    assert changed == {"ablation.json"}


def test_a_training_that_fails_leaves_the_others(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = load_sweep(write_sweep(tmp_path, toys))
    run = ablation.run_trial
    with monkeypatch.context() as patch:
        patch.setattr(ablation, "run_trial", lambda trials, n, **_: "broke" if n == 1 else run(trials, n))
        with pytest.raises(
            IncompleteError, match=r"1 of 4 trainings failed: 000-mode-off-seed4 \(unify.mode=off\): broke"
        ):
            ablate(sweep)
    assert (sweep.out / "001-mode-untrained-seed4/summary.json").exists()
    rows = [
        row for row in json.loads((sweep.out / "ablation.json").read_text())["rows"] if row["figure"] == "big patch"
    ]
    assert [row["seeds"] for row in rows] == [1, 2]
    assert rows[1]["difference"] is not None and rows[1]["low"] is None
    assert len(ablate(sweep).rows) > 0


def test_what_pytorch_raises_is_the_failure_of_one_training(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = ablation.fit

    def full(config: TrainConfig, path: Path, **options: Any) -> Fitted:
        if path.name == "000-mode-off-seed4":
            raise torch.OutOfMemoryError("no memory")
        return fit(config, path, **options)

    monkeypatch.setattr(ablation, "fit", full)
    with pytest.raises(IncompleteError, match=r"1 of 4 .*000-mode-off-seed4 .*OutOfMemoryError: no memory"):
        ablate(load_sweep(write_sweep(tmp_path, toys)))


def test_a_sweep_that_cannot_work_is_bad_input(toys: Path, tmp_path: Path) -> None:
    sweep: Sweep = load_sweep(write_sweep(tmp_path, toys, grid={"base": ["none"]}))
    with pytest.raises(ConfigError, match="2 of 2 trainings failed"):
        ablate(sweep)


def test_the_table_says_where_each_training_is(toys: Path, tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path, toys, grid={"student.merge": ["concat"]}, seeds=[4]))
    ablate(sweep)
    (kept,) = json.loads((sweep.out / "ablation.json").read_text())["runs"]
    cell = {"student.merge": "concat"}
    assert kept == {"folder": "000-merge-concat-seed4", "cell": "student.merge=concat", "set": cell, "seed": 4}
    assert (sweep.out / kept["folder"] / "summary.json").exists()


def test_a_sweep_of_an_older_release_goes_on_in_its_folders(toys: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, toys, grid={"student.merge": ["concat"]}, seeds=[4])
    done = ablate(load_sweep(file))
    (done.out / "000-merge-concat-seed4").rename(done.out / "000-seed4")
    again = ablate(load_sweep(file))
    assert [trial["folder"] for trial in again.trials] == ["000-seed4"]
    assert again.rows == done.rows
    assert not (done.out / "000-merge-concat-seed4").exists()


def test_a_folder_with_other_files_is_refused(toys: Path, tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path, toys, grid={}, seeds=[4]))
    sweep.out.mkdir()
    (sweep.out / "thesis.tex").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"out: \S+/sweep: expected .*an empty folder.*found other files \(thesis\.tex\)"
    ):
        ablate(sweep)
    assert [path.name for path in sweep.out.iterdir()] == ["thesis.tex"]
    (sweep.out / "thesis.tex").unlink()
    found = ablate(sweep)
    (sweep.out / "notes.txt").write_text("mine")
    assert ablate(sweep) == found


@pytest.mark.parametrize("what", ["cache", "configuration"])
def test_a_training_of_another_sweep_is_not_taken_for_one_of_this(
    what: str, toys: Path, tmp_path: Path, extract: Extract
) -> None:
    grid = {"student.width": [8]}
    ablate(load_sweep(write_sweep(tmp_path, toys, grid=grid, seeds=[4])))
    before = snapshot(tmp_path / "sweep")
    if what == "cache":
        other = extract("coarse", "codec.step=0.5", general="toy", big="wider", shy="poisoned")
        file, found = write_sweep(tmp_path, other, grid=grid, seeds=[3, 4]), r"begun with \S+toys.kpu, now \S+coarse"
    else:
        file, found = (
            write_sweep(tmp_path, toys, grid={"student.width": [4]}, seeds=[3, 4]),
            r"student\.width: begun with 8, now 4",
        )
    expected = rf"000-width-8-seed4: .*student\.width=\d with seed 4.*{found}.*another `out`"
    with pytest.raises(MismatchError, match=expected):
        ablate(load_sweep(file))
    assert snapshot(tmp_path / "sweep") == before


def test_trainings_at_once_share_the_memory(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "free_memory", lambda processes: 3000 // processes)
    sweep = load_sweep(write_sweep(tmp_path, toys, grid={"loader.memory": ["auto", 7]}, seeds=[0]))
    trials = [(trial, tmp_path / trial.name) for trial in sweep.trials]
    assert [run_trial(trials, number, beside=3) for number in range(2)] == [None, None]
    assert [RunFolder(path).config().loader.memory for _, path in trials] == [1000, 7]


@pytest.mark.parametrize(("threads", "gpu", "expected"), [(1, 0, 8), (3, 0, 2), (1, 1, 2), (9, 0, 1)])
def test_as_many_at_once_as_the_largest_machine_has_room_for(
    threads: int, gpu: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from trainer.ray_train import _at_once

    machines = [(True, {"CPU": 4.0, "GPU": 2.0}), (True, {"CPU": 8.0}), (False, {"CPU": 64.0, "GPU": 8.0})]
    nodes = [{"Alive": alive, "Resources": resources} for alive, resources in machines]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert _at_once(threads, gpu) == expected


def test_the_command_prints_the_table(toys: Path, tmp_path: Path) -> None:
    from cli.train import app

    file = write_sweep(tmp_path, toys)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["ablate", "-c", str(file)])
    assert result.exit_code == 0, result.output
    assert "unify.mode=untrained" in result.stdout
    assert "95% interval" in result.stdout
    again = CliRunner().invoke(app, ["ablate", "-c", str(file), "--json"])
    rows = json.loads(again.stdout)["rows"]
    assert all(math.isfinite(row["mean"]) for row in rows)
