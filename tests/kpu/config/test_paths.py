"""Relative paths in a configuration file begin at its folder."""

from pathlib import Path
from typing import Any

import pytest

from kpu.config.paths import anchor_paths
from kpu.errors import ConfigError
from pipeline.config import load_config
from trainer.config import load_config as load_train_config
from trainer.sweep.sweeps import load_sweep

EXTRACT = """
data: {source: [images, "more/{0..2}.tar", "s3://bucket/x", /abs]}
out: ../caches/my.kpu
teachers:
  own: {model: "torch:models/net.py:build", weights: weights/own.safetensors}
  module: {model: "torch:package.net:build", weights: random}
  hub: {model: "hf:facebook/dinov2-small"}
  folder: {model: "hf:local"}
  timm: {model: "timm:local-dir:local"}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of configurations; the working directory is another one."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "project/local").mkdir(parents=True)
    return tmp_path / "project"


def test_every_path_of_an_extraction_begins_at_its_file(folder: Path) -> None:
    (folder / "extract.yaml").write_text(EXTRACT)
    for name in (folder / "extract.yaml", Path("../project/extract.yaml")):
        config = load_config(name, overrides=["calibration_from=other.kpu"])
        assert config.data.source == (
            f"{folder}/images",
            f"{folder}/more/{{0..2}}.tar",
            "s3://bucket/x",
            "/abs",
        )
        assert config.out == str(folder.parent / "caches/my.kpu")
        assert config.calibration_from == "other.kpu"  # of the command line
        assert [(teacher.model, teacher.weights) for teacher in config.teachers.values()] == [
            (f"torch:{folder}/models/net.py:build", f"{folder}/weights/own.safetensors"),
            ("torch:package.net:build", "random"),
            ("hf:facebook/dinov2-small", None),
            (f"hf:{folder}/local", None),
            (f"timm:local-dir:{folder}/local", None),
        ]


def test_flags_begin_at_the_working_directory(folder: Path) -> None:
    (folder / "extract.yaml").write_text(EXTRACT)
    config = load_config(folder / "extract.yaml", out="here.kpu", data="pictures")
    assert (config.out, config.data.source) == ("here.kpu", "pictures")


def test_a_file_in_the_working_directory_is_left_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "extract.yaml").write_text(EXTRACT)
    monkeypatch.chdir(folder)
    assert load_config("extract.yaml").out == "../caches/my.kpu"


def test_a_path_that_only_leads_somewhere_from_the_working_directory_is_refused(folder: Path) -> None:
    (folder / "extract.yaml").write_text("data: {source: images}\nout: my.kpu\nteachers: {t: {model: 'timm:x'}}\n")
    Path("my.kpu").mkdir()
    expected = rf"extract\.yaml: out: expected something at {folder}/my\.kpu.*elsewhere/my\.kpu exists"
    with pytest.raises(ConfigError, match=expected):
        load_config(folder / "extract.yaml")
    (folder / "my.kpu").mkdir()
    assert load_config(folder / "extract.yaml").out == f"{folder}/my.kpu"


def test_paths_of_trainings_and_sweeps(folder: Path) -> None:
    (folder / "train.yaml").write_text(
        "caches: [a.kpu, /b.kpu]\nbase: x\nimages: {root: pictures}\n"
        "student: {kind: full, model: 'torch:net.py:build', weights: null}\n"
    )
    config = load_train_config(folder / "train.yaml")
    assert config.caches == (f"{folder}/a.kpu", "/b.kpu")
    assert config.student.model == f"torch:{folder}/net.py:build" and config.images.root == f"{folder}/pictures"
    (folder / "sweeps").mkdir()
    (folder / "sweeps/s.yaml").write_text("config: ../train.yaml\nout: ../runs\nexecutor: inline\nseeds: [0]\n")
    sweep = load_sweep(folder / "sweeps/s.yaml")
    assert sweep.out == folder / "runs" and sweep.trials[0].config.caches[0] == f"{folder}/a.kpu"
    (folder / "s.yaml").write_text("config: {caches: [a.kpu], base: x}\nout: runs\nseeds: [0]\n")
    assert load_sweep(folder / "s.yaml").trials[0].config.caches == (f"{folder}/a.kpu",)


@pytest.mark.parametrize("values", [{"out": 3}, {"data": None}, {"data": "images"}, {"teachers": [1]}, {"out": None}])
def test_values_of_other_types_are_left_for_validation(folder: Path, values: dict[str, Any]) -> None:
    before = dict(values)
    anchor_paths(values, folder / "x.yaml", ("data.source", "out", "teachers.*.model"))
    assert values == before
