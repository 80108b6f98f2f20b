"""Labels of different caches are compared by the names of their classes, or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from kpu import open_cache
from tests.support.toys import kpu
from tests.support.trained import labelled_cache, labelled_images, small_run
from trainer.data.corpus import Corpus
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.labels import Numbering

Extract = Callable[..., Path]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def extract(place: Path, tmp_path: Path) -> Extract:
    """Extract images by the teachers of the run; `labels` are those of `big`."""
    labelled_cache(place)

    def run(images: Path, name: str, labels: str = "[0,1,null]") -> Path:
        teachers = [f"--teacher=general=torch:{place}/toy.py:toy", f"--teacher=big=torch:{place}/toy.py:wider"]
        sets = [f"--set=teachers.big.labels={labels}", "--set=executor.threads=1"]
        result = kpu("extract", images, *teachers, *sets, "-o", tmp_path / f"{name}.kpu")
        assert result.exit_code == 0, result.output
        return tmp_path / f"{name}.kpu"

    return run


def without(place: Path, tmp_path: Path, *classes: str) -> Path:
    """Other images than those of the training, of fewer classes."""
    images = Path(shutil.copytree(labelled_images(place, 1), tmp_path / "images"))
    for name in classes:
        shutil.rmtree(images / name)
    return images


def accuracies(found: dict[str, Any]) -> list[float | None]:
    return [found["teacher_alone"]["big"]["accuracy"], found["frozen_base"]["teachers"]["big"]["accuracy"]]


def test_numbers_that_mean_other_classes_give_no_accuracy(place: Path, tmp_path: Path, extract: Extract) -> None:
    """Without class 0 the labels 0 and 1 are the classes 1 and 2: those of the head still mean 0 and 1."""
    cache = extract(without(place, tmp_path, "0"), "fewer")
    found = evaluate(small_run(place), [str(cache)])
    assert accuracies(found) == [None, None]
    assert found["teachers"]["big"]["agreement"] is not None
    assert any(
        "no accuracy of teacher 'big': output 0 of its head means class '0' in" in note
        and "'1' in" in note
        and "extract with `labels` that name the classes" in note
        for note in found["notes"]
    )
    assert found["linear_probe"] > 0.8, "labels of probes are matched by name: chance is a half"
    assert any("labels are matched by the classes' names" in note for note in found["notes"])


def test_labels_by_name_mean_the_same_in_every_cache(place: Path, tmp_path: Path, extract: Extract) -> None:
    images = without(place, tmp_path, "0")
    cache = open_cache(extract(images, "fewer", '["0","1",null]'))
    assert cache.teachers["big"].spec.labels == ("0", "1", -1)
    found = evaluate(small_run(place), [cache.path])
    weight, bias = cache.teachers["big"].head or (None, None)
    assert weight is not None
    answers = (cache.read("big", "global", range(80)) @ weight.T + bias).argmax(1)
    truth = np.where(np.arange(80) < 40, 1, -1)  # class 1, then class 2, which is among the other ones
    assert accuracies(found)[0] == pytest.approx(np.mean(np.array([0, 1, -1])[answers] == truth))


def test_classes_that_the_training_lacks_are_left_out_of_probes(place: Path, tmp_path: Path, extract: Extract) -> None:
    images = without(place, tmp_path, "0")
    (images / "2").rename(images / "unknown")
    found = evaluate(small_run(place), [str(extract(images, "other", '["0","1",null]'))])
    assert found["rows"] == 80
    assert found["linear_probe"] > 0.8
    assert "40 rows are left out of the probes: the training has none of their classes (unknown)" in found["notes"]


def test_numbers_are_not_compared_with_names(place: Path, tmp_path: Path, extract: Extract) -> None:
    images = sorted(labelled_images(place, 1).glob("*/*.png"))
    columns = {"image": [path.read_bytes() for path in images], "label": [int(path.parent.name) for path in images]}
    pq.write_table(pa.table(columns), tmp_path / "numbered.parquet")
    cache = extract(tmp_path / "numbered.parquet", "numbered")
    found = evaluate(small_run(place), [str(cache)])
    assert found["linear_probe"] is found["knn"] is None
    assert any(
        "numbers without names" in note and "nothing says that they mean the same" in note for note in found["notes"]
    )
    assert accuracies(found)[0] is not None, "head and labels of one cache agree with each other"
    from cli.train import app

    command = ["eval", str(small_run(place)), "--cache", str(cache), "--trust-code", "--json"]
    told = json.loads(CliRunner().invoke(app, [*command, "--same-labels"]).stdout)
    assert told["linear_probe"] > 0.8
    assert not any("names" in note for note in told["notes"])
    both = evaluate(small_run(place), [str(cache), str(extract(without(place, tmp_path, "0"), "fewer"))])
    assert accuracies(both) == [None, None]
    assert any(note.startswith("no accuracy: the labels of") for note in both["notes"])


def test_labels_below_zero_are_none(place: Path, tmp_path: Path, extract: Extract) -> None:
    images = sorted(labelled_images(place, 1).glob("*/*.png"))
    labels = [-1 if row % 2 else -100 for row in range(len(images))]
    pq.write_table(pa.table({"image": [path.read_bytes() for path in images], "label": labels}), tmp_path / "t.parquet")
    cache = extract(tmp_path / "t.parquet", "unlabelled")
    corpus = Corpus([str(cache)], {"general": ("global",)}, "general")
    assert set(corpus.labels()) == {-1}
    assert Numbering([corpus.caches[0], open_cache(labelled_cache(place))]).why_not is None
    found = evaluate(small_run(place), [str(cache)])
    assert found["linear_probe"] is found["teacher_alone"]["big"]["accuracy"] is None
    assert any("no measured row has a label" in note for note in found["notes"])
    assert "labels   for 0 of 120 rows" in kpu("info", cache).stdout


def test_numbering(place: Path, tmp_path: Path, extract: Extract) -> None:
    all_three, fewer = open_cache(labelled_cache(place)), open_cache(extract(without(place, tmp_path, "1"), "fewer"))
    labels = np.array([1, 0, -1, -7, 1])
    same = Numbering([all_three, open_cache(labelled_cache(place, "other", 1, ()))])
    assert same.labels(all_three, labels).tolist() == [1, 0, -1, -1, 1]
    mixed = Numbering([all_three, fewer])
    assert mixed.names == ("0", "1", "2")
    assert mixed.labels(fewer, labels).tolist() == [2, 0, -1, -1, 2]
    assert Numbering([fewer, all_three]).labels(all_three, np.array([0, 1, 2])).tolist() == [0, 2, 1]
    assert mixed.numbers(fewer, (1, "new", "1", -1)) == (2, 3, 1, -1)
    assert mixed.name(3) == "'new'"
