"""Runs side by side, on evaluations whose figures are set by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kpu.errors import ConfigError, CorruptError
from trainer.config import validate_config
from trainer.evaluation.compare import compare, mean_r2, plot
from trainer.loop.selection import overall_r2


def scores_of(**r2: float) -> dict[str, Any]:
    """An evaluation in which each teacher has that R2, and 0.2 by the frozen base."""

    def teachers(values: dict[str, float]) -> dict[str, Any]:
        return {
            name: {"kappa": 0.5, "r2_global": value + 0.1, "r2_patch": value - 0.1} for name, value in values.items()
        }

    return {
        "teachers": teachers(r2),
        "frozen_base": {"teachers": teachers(dict.fromkeys(r2, 0.2))},
        "base": {"r2": 0.9, "kappa": 0.8},
        "linear_probe": 0.7,
        "knn": 0.6,
        "effective_rank": 5.0,
        "caches": ["c"],
        "rows": 5,
    }


def spec_of(name: str, weights: str = "0" * 32) -> dict[str, Any]:
    """A teacher as `sources.json` describes it."""
    return {
        "name": name, "model": f"timm:{name}", "weights": None, "weights_digest": weights, "input": None,
        "precision": "fp32", "outputs": [], "codec": {"name": "uniform", "step": 0.05},
    }  # fmt: skip


def change(folder: Path, file: str, **values: Any) -> None:
    """Lay values over a document of a run."""
    document = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**document, **values}))


def write_run(folder: Path, evaluated: bool = True, kind: str = "side", seed: int = 0, **r2: float) -> Path:
    folder.mkdir(parents=True)
    student = {"kind": kind, "model": "timm:resnet18" if kind == "full" else None}
    values = {"caches": ["c"], "base": "b", "teachers": list(r2), "student": student, "seed": seed}
    config = validate_config(values, "test")
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    caches = [{"path": "c", "plan": "p", "rows": 50, "teachers": {}}]
    sources = {"teachers": {name: spec_of(name) for name in r2}, "seeds": {}, "caches": caches}
    (folder / "sources.json").write_text(json.dumps(sources))
    scores = scores_of(**r2)
    summary = {
        "steps": 20, "rows": 2000, "seconds": 4.0, "parameters": 7, "validation_rows": 5,
        "validation": {part: scores[part] for part in ("teachers", "base")},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    half = scores_of(**{name: value / 2 for name, value in r2.items()})
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 10, "validation": half}) + "\n")
    if evaluated:
        (folder / "eval.json").write_text(json.dumps(scores))
    return folder


def test_transfer_is_relative_to_a_run_for_that_teacher_alone(tmp_path: Path) -> None:
    both = write_run(tmp_path / "both", b=1.0, s=0.5, t=0.3, u=0.4)
    solo_s, solo_t = write_run(tmp_path / "s", b=1.0, s=0.6), write_run(tmp_path / "t", b=1.0, t=0.7)
    hopeless = write_run(tmp_path / "u", b=1.0, u=0.21)
    found = compare([both, solo_s, solo_t, hopeless])[0]
    assert found.transfer == pytest.approx({"s": 0.3 / 0.4, "t": 0.1 / 0.5})  # nothing is divided by u's 0.01
    values = found.as_json()
    assert values["transfer_min"] == pytest.approx(0.2)
    assert values["transfer_spread"] == pytest.approx(0.75 - 0.2)
    assert values["rows_per_second"] == 500
    assert compare([both, solo_s])[0].transfer.keys() == {"s"}


def test_transfer_is_relative_to_a_student_of_the_same_kind_on_the_same_rows(tmp_path: Path) -> None:
    both = write_run(tmp_path / "both", b=1.0, s=0.5, t=0.3, seed=1)
    side = write_run(tmp_path / "side", b=1.0, s=0.6)
    seeded = write_run(tmp_path / "seeded", b=1.0, s=0.7, seed=1)
    full = write_run(tmp_path / "full", b=1.0, s=0.9, kind="full")
    for order in ([both, side, seeded, full], [full, seeded, side, both]):
        found = {run.name: run.transfer.get("s") for run in compare(order)}
        assert found == pytest.approx({"both": 0.3 / 0.5, "side": 1, "seeded": 1, "full": 1})
    assert compare([both, full])[0].transfer == {}
    change(side, "eval.json", rows=6)
    assert compare([both, side])[0].transfer == {}


def test_what_does_not_compare_is_noted(tmp_path: Path) -> None:
    same, again, other = (write_run(tmp_path / name, b=1.0, s=0.5) for name in ("same", "again", "other"))
    alone = write_run(tmp_path / "alone", b=1.0)
    assert [run.notes for run in compare([same, again, alone])] == [[], [], []]
    change(other, "sources.json", caches=[{"path": "d", "plan": "q", "rows": 9, "teachers": {}}])
    change(other, "sources.json", teachers={"b": spec_of("b"), "s": spec_of("s", "1" * 32)})
    found = {run.name: run for run in compare([same, again, other, alone])}
    measured, learned, model = found["same"].notes
    assert measured.startswith("measured on other rows (same, again, alone: 5 rows of c; other: 5 rows of c)")
    assert measured.endswith("do not compare")
    assert learned.startswith("learned from other caches (same, again, alone: c; other: ")
    assert model == (
        "s is another model (same, again: timm:s (weights 00000000, fp32); other: timm:s (weights 11111111, fp32)): "
        "its R2 does not compare"
    )
    assert found["alone"].notes == [measured, learned]
    assert found["other"].as_json()["notes"] == [measured, learned, model]


def test_another_base_and_other_rows_are_noted(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", b=1.0, s=0.5), write_run(tmp_path / "two", b=1.0, s=0.5)
    change(two, "eval.json", rows=7)
    (two / "config.yaml").write_text((two / "config.yaml").read_text().replace("base: b", "base: s"))
    assert compare([one, two])[0].notes == [
        "measured on other rows (one: 5 rows of c; two: 7 rows of c): R2, probes and ranks do not compare",
        "another base (one: b; two: s): what is left of it does not compare",
    ]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / place / "run", b=1.0) for place in ("here", "there")]
    assert [run.name for run in compare([*paths, write_run(tmp_path / "x", b=1.0)])] == [*map(str, paths), "x"]
    assert [run.name for run in compare([paths[0], paths[0]])] == ["run", "run"]


def test_without_controls_there_is_no_transfer(tmp_path: Path) -> None:
    both, solo = write_run(tmp_path / "both", b=1.0, s=0.5), write_run(tmp_path / "s", b=1.0, s=0.6)
    scores = scores_of(b=1.0, s=0.5)
    del scores["frozen_base"]
    (both / "eval.json").write_text(json.dumps(scores))
    assert compare([both, solo])[0].transfer == {}


def test_the_course_ends_with_the_summary(tmp_path: Path) -> None:
    (found,) = compare([write_run(tmp_path / "run", b=0.8, s=0.4)])
    assert [(step, overall_r2(scores)) for step, scores in found.curve] == [
        (10, pytest.approx(0.3)),
        (20, pytest.approx(0.6)),
    ]


def test_without_an_evaluation_the_summary_speaks(tmp_path: Path) -> None:
    (found,) = compare([write_run(tmp_path / "run", False, b=0.8, s=0.4)])
    assert found.scores is None
    assert mean_r2(found.r2["s"]) == pytest.approx(0.4)
    assert found.kept == {"r2": 0.9, "kappa": 0.8}


def test_mean_needs_every_output() -> None:
    assert mean_r2({"r2_global": 0.5, "r2_patch": 0.3}) == pytest.approx(0.4)
    assert mean_r2({"r2_global": 0.5, "r2_patch": None}) is None
    assert mean_r2({}) is None


def test_the_plot(tmp_path: Path) -> None:
    runs = compare([write_run(tmp_path / "one", b=0.8, s=0.4), write_run(tmp_path / "two", b=0.8)])
    plot(runs, tmp_path / "pictures/p.png")
    assert (tmp_path / "pictures/p.png").read_bytes().startswith(b"\x89PNG")
    plot(runs, tmp_path / "p.svg")
    assert all(name in (tmp_path / "p.svg").read_text() for name in ("one", "two"))
    with pytest.raises(ConfigError, match=r"plot: .*give a path that ends in \.png or \.svg"):
        plot(runs, tmp_path / "p.nothing")


def test_rejects_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a run of kpu-train, found an empty folder"):
        compare([tmp_path])
    run = write_run(tmp_path / "run", b=1.0)
    for text in ("{", "[]", "{}"):
        (run / "eval.json").write_text(text)
        with pytest.raises(CorruptError, match=r"eval\.json: .*run `kpu-train eval` again"):
            compare([run])
    (run / "summary.json").unlink()
    with pytest.raises(ConfigError, match="expected a run that ended"):
        compare([run])
