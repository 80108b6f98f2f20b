"""Evaluation against sums worked out by hand, on the run's own cache, on another one, and without training caches."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kpu import open_cache
from kpu.errors import ConfigError, CorruptError, MismatchError
from tests.support.toys import kpu, write_images
from tests.support.trained import labelled_cache, labelled_images, small_run
from trainer.data.loading import Batch
from trainer.data.shapes import OutputShape
from trainer.data.split import validation_mask
from trainer.evaluation import controls
from trainer.evaluation.controls import PENALTY, LinearMaps
from trainer.evaluation.evaluate import evaluate, evaluation_file
from trainer.evaluation.measures import mapped_accuracy
from trainer.evaluation.trained import load_trained
from trainer.objective.losses import resize_map
from trainer.run.runs import RunFolder

KEYS = {"agreement", "kappa", "majority", "accuracy", "r2_global", "r2_patch"}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, Any]:
    return evaluate(small_run(place))


def test_keys(found: dict[str, Any], place: Path) -> None:
    assert set(found["teachers"]) == set(found["frozen_base"]["teachers"]) == {"general", "big"}
    for scores in (found, found["frozen_base"]):
        assert all(set(each) == KEYS for each in scores["teachers"].values())
        assert set(scores["base"]) == {"r2", "r2_global", "r2_patch", "agreement", "kappa", "majority"}
        assert {"linear_probe", "knn", "effective_rank"} <= set(scores)
    assert set(found["teacher_alone"]["big"]) == {"accuracy", "linear_probe", "knn", "effective_rank"}
    assert found["notes"] == []
    assert json.loads((small_run(place) / evaluation_file(None)).read_bytes()) == found


def test_agrees_with_the_summary_of_the_run(found: dict[str, Any], place: Path) -> None:
    summary = RunFolder(small_run(place)).summary()
    assert summary is not None
    assert found["rows"] == summary["validation_rows"] > 0
    for name, scores in summary["validation"]["teachers"].items():
        assert found["teachers"][name] == pytest.approx({**found["teachers"][name], **scores}, abs=1e-5)
    assert found["base"]["r2"] == pytest.approx(summary["validation"]["base"]["r2"], abs=1e-5)


def test_heads_by_hand(found: dict[str, Any], place: Path) -> None:
    """The inherited head of `big`, in float64, over the validation rows."""
    trained = load_trained(small_run(place))
    cache = open_cache(labelled_cache(place))
    table = cache.samples.to_table(columns=["key", "label"])
    rows = np.flatnonzero(validation_mask(table["key"].to_pylist(), 0.25))
    labels = table["label"].to_numpy()[rows]
    head, base = cache.teachers["big"].head, cache.teachers["general"].statistics
    assert head is not None
    weight, bias = (np.float64(part) for part in head)
    own = (cache.read("big", "global", rows) @ weight.T + bias).argmax(1)
    given = {
        o: torch.from_numpy(((cache.read("general", o, rows) - base[o].centre) / base[o].std).astype(np.float32))
        for o in ("global", "patch")
    }
    with torch.no_grad():
        z = trained.model.student(given, None)
        predicted = trained.model.predict(z, "big")["global"].double().numpy()
        kept = z["global"].double().numpy()
    statistics = cache.teachers["big"].statistics["global"]
    inherited = ((predicted * statistics.std + statistics.centre) @ weight.T + bias).argmax(1)
    scores = found["teachers"]["big"]
    assert len(set(own)) > 1  # else every measure of agreement is trivial
    assert scores["agreement"] == pytest.approx(np.mean(own == inherited))
    assert scores["majority"] == pytest.approx(np.bincount(own).max() / len(own))
    truth = np.where(labels < 2, labels, -1)
    assert scores["accuracy"] == pytest.approx(np.mean(np.array([0, 1, -1])[inherited] == truth))
    assert found["teacher_alone"]["big"]["accuracy"] == pytest.approx(np.mean(np.array([0, 1, -1])[own] == truth))
    own_head = cache.teachers["general"].head
    assert own_head is not None
    logits = (kept * base["global"].std + base["global"].centre) @ np.float64(own_head[0]).T + own_head[1]
    theirs = cache.read("general", "global", rows) @ own_head[0].T + own_head[1]
    assert found["base"]["agreement"] == pytest.approx(np.mean(logits.argmax(1) == theirs.argmax(1)))
    residual, centred = (kept - given["global"].numpy()), given["global"].numpy()
    r2 = 1 - (residual**2).sum(0) / ((centred - centred.mean(0)) ** 2).sum(0)
    assert found["base"]["r2_global"] == pytest.approx(r2.mean(), abs=1e-5)


def test_controls(found: dict[str, Any]) -> None:
    frozen = found["frozen_base"]
    assert frozen["base"]["r2"] == frozen["base"]["kappa"] == 1
    assert frozen["teachers"]["general"]["r2_global"] > 0.999
    assert frozen["linear_probe"] == found["teacher_alone"]["general"]["linear_probe"] > 0.8  # chance is a third
    assert found["teachers"]["general"]["accuracy"] is None  # its outputs stand for no label


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (4, 4)])
def test_linear_maps_are_ridge_regression(grid: tuple[int, int]) -> None:
    numbers = torch.Generator().manual_seed(0)
    shapes = {
        "b": {"global": OutputShape(3), "patch": OutputShape(3, (2, 2))},
        "t": {"global": OutputShape(2), "patch": OutputShape(2, grid)},
    }
    targets = {
        name: {
            o: torch.randn(30, *((s.channels,) if s.grid is None else (s.tokens, s.channels)), generator=numbers)
            for o, s in outputs.items()
        }
        for name, outputs in shapes.items()
    }
    weights = {"b": torch.ones(30), "t": torch.ones(30)}
    weights["t"][:5] = 0
    maps = LinearMaps("b", shapes, np.arange(30), 0)
    for part in (slice(0, 11), slice(11, 30)):
        rows = np.arange(30)[part]
        cut = {name: {o: y[part] for o, y in outputs.items()} for name, outputs in targets.items()}
        maps.update(Batch(rows, rows, cut, {name: weight[part] for name, weight in weights.items()}))
    predicted = maps.solve().predict(targets["b"], "t")
    aligned = {"global": targets["b"]["global"], "patch": resize_map(targets["b"]["patch"], (2, 2), grid)}
    for output, x in aligned.items():
        wide = np.c_[x[5:].reshape(-1, 3).double().numpy(), np.ones(x[5:].numel() // 3)]
        y = targets["t"][output][5:].reshape(-1, 2).double().numpy()
        penalty = PENALTY * len(wide) * np.diag([1, 1, 1, 0])
        weight = np.linalg.solve(wide.T @ wide + penalty, wide.T @ y)
        assert np.allclose(predicted[output][5:].reshape(-1, 2).numpy(), wide @ weight, atol=1e-5)


def test_linear_maps_see_all_of_a_cache_where_they_take_some_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order of class, y = x in one and y = -x in the other: a map of the first alone would be the identity."""
    monkeypatch.setattr(controls, "VECTORS", 400)
    shapes = {name: {"patch": OutputShape(1, (2, 2))} for name in ("b", "t")}
    x = torch.randn(1000, 4, 1, generator=torch.Generator().manual_seed(0))
    y = torch.where(torch.arange(1000)[:, None, None] < 500, x, -x)
    maps, rows = LinearMaps("b", shapes, np.arange(1000), 0), np.arange(1000)
    for part in np.array_split(rows, 7):
        weights = dict.fromkeys("bt", torch.ones(len(part)))
        maps.update(Batch(part, part, {"b": {"patch": x[part]}, "t": {"patch": y[part]}}, weights))
    assert maps.solve().predict({"patch": torch.ones(1, 4, 1)}, "t")["patch"].abs().max() < 0.3


def test_mapped_accuracy() -> None:
    answers, truth = np.array([0, 1, 2, 2, 0, 1]), np.array([7, 7, 3, 5, -1, 3])
    assert mapped_accuracy(answers, truth, np.array([7, 3, -1])) == 3 / 5  # the unlabelled row is left out
    assert mapped_accuracy(answers, truth, np.array([7, 3, 5])) == 3 / 5
    assert mapped_accuracy(answers, truth, np.array([7, -1, -1])) == 1 / 2  # two outputs without a label: only the 7s
    assert mapped_accuracy(answers, truth, np.array([-1, -1, -1])) is None


def test_another_cache(place: Path) -> None:
    """Other images, a subset of the teachers, another grid: everything is measured in the run's units."""
    other = labelled_cache(place, "other", 1, ())
    found = evaluate(small_run(place), [str(other)])
    assert found["rows"] == 120
    assert set(found["teachers"]) == {"general"}
    assert found["teachers"]["general"]["r2_global"] > 0
    assert found["linear_probe"] > 0.8
    assert any("'big' is not measured" in note for note in found["notes"])
    name = evaluation_file(None).replace(".json", "-")
    assert [file.name for file in small_run(place).glob(f"{name}*")] != []


def test_a_training_cache_given_by_its_path_gives_its_validation_rows(found: dict[str, Any], place: Path) -> None:
    assert evaluate(small_run(place), [str(labelled_cache(place))])["rows"] == found["rows"]


def test_no_labels(place: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "flat", 12)
    result = kpu("extract", images, f"--teacher=general=torch:{place}/toy.py:toy", "-o", tmp_path / "flat.kpu")
    assert result.exit_code == 0, result.output
    found = evaluate(small_run(place), [str(tmp_path / "flat.kpu")])
    assert found["linear_probe"] is found["knn"] is found["teachers"]["general"]["accuracy"] is None
    assert found["effective_rank"] > 1
    assert any("no measured row has a label" in note for note in found["notes"])


def test_training_caches_that_are_gone(place: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(small_run(place), tmp_path / "run"))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(labelled_cache(place)), str(tmp_path / "gone.kpu")))
    other = labelled_cache(place, "other", 1, ())
    found = evaluate(run, [str(other)])
    assert found["linear_probe"] is None
    assert found["frozen_base"]["teachers"]["general"]["r2_global"] is None
    assert found["teachers"]["general"]["kappa"] is not None
    assert any("training caches cannot be read" in note for note in found["notes"])


def test_a_training_cache_that_moved_is_known(place: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(labelled_cache(place), tmp_path / "cache.kpu"))
    run = small_run(place, "run-moved", caches=(str(cache),))
    before = evaluate(run)
    cache.rename(tmp_path / "moved.kpu")
    after = evaluate(run, [str(tmp_path / "moved.kpu")])
    assert 0 < after["rows"] < open_cache(tmp_path / "moved.kpu").rows / 2
    differing = {key for key in before if after[key] != before[key]}
    assert differing == {"caches", "notes"}


@pytest.mark.parametrize("change", ["views=2", "data.limit=90"])
def test_images_of_the_training_are_known_in_any_cache(change: str, place: Path, tmp_path: Path) -> None:
    """A copy of their folder, extracted in another way: only rows that were held back are measured."""
    images = Path(shutil.copytree(labelled_images(place), tmp_path / "copy"))
    options = [f"--set={change}", "--set=calibration_rows=60", "-o", tmp_path / "again.kpu"]
    made = kpu("extract", images, f"--teacher=general=torch:{place}/toy.py:toy", *options)
    assert made.exit_code == 0, made.output
    found = evaluate(small_run(place), [str(tmp_path / "again.kpu")])
    keys = open_cache(tmp_path / "again.kpu").samples.to_table(columns=["key"])["key"].to_pylist()
    held_back = validation_mask(keys, 0.25)
    assert found["rows"] == np.count_nonzero(held_back)
    assert f"{np.count_nonzero(~held_back)} rows are left out: the student learned from their images" in found["notes"]


def test_a_training_cache_is_known_where_another_is_gone(place: Path, tmp_path: Path) -> None:
    cache, other = labelled_cache(place), labelled_cache(place, "other", 1, ())
    gone = Path(shutil.copytree(other, tmp_path / "gone.kpu"))
    run = small_run(place, "run-two", caches=(str(cache), str(gone)))
    shutil.rmtree(gone)
    found = evaluate(run, [str(cache)])
    keys = open_cache(cache).samples.to_table(columns=["key"])["key"].to_pylist()
    assert found["rows"] == np.count_nonzero(validation_mask(keys, 0.25))
    assert any("training caches cannot be read" in note for note in found["notes"])


def test_rejects_runs_that_cannot_be_measured(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a run of kpu-train, found an empty folder"):
        evaluate(tmp_path)
    run = Path(shutil.copytree(small_run(place), tmp_path / "run"))
    (run / "model.safetensors").unlink()
    with pytest.raises(CorruptError, match=r"model\.safetensors: cannot be read"):
        evaluate(run)
    (run / "summary.json").unlink()
    with pytest.raises(ConfigError, match="expected a run that ended"):
        evaluate(run)
    images = write_images(tmp_path / "flat", 3)
    for name, factory in (("another", "toy"), ("general", "wider")):
        made = kpu(
            "extract", images, f"--teacher={name}=torch:{place}/toy.py:{factory}", "-o", tmp_path / f"{name}.kpu"
        )
        assert made.exit_code == 0, made.output
    with pytest.raises(ConfigError, match="expected the base 'general' of the run"):
        evaluate(small_run(place), [str(tmp_path / "another.kpu")])
    with pytest.raises(MismatchError, match=r"teacher 'general' is another model than the run's: .*weights_digest"):
        evaluate(small_run(place), [str(tmp_path / "general.kpu")])
