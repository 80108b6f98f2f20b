"""`verify --deep`: the teachers, run again, find what no checksum can."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kpu import open_cache
from kpu.tools.verify import VerifyReport
from pipeline.recorded import teacher_config
from pipeline.verify_deep import verify_deep
from pipeline.worker.worker import Worker
from tests.support.toys import assert_refused, kpu, write_images, write_teacher


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("deep")
    images, model = write_images(place / "images", 70), write_teacher(place)
    (images / "005.png").write_bytes(b"no image")
    arguments = ["-t", f"t={model}:toy", "-t", f"u={model}:wider", "--set", "teachers.u.codec.name=bf16"]
    arguments += ["-t", f"v={model}:wider", "--set", "teachers.v.codec.name=rotated"]
    assert kpu("extract", images, *arguments, "-o", place / "o.kpu").exit_code == 0
    return place / "o.kpu"


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "o.kpu"))


def test_sound_features_of_every_row(original: Path) -> None:
    report, rows = verify_deep(str(original), VerifyReport(), rows=1000, seed=0)
    assert report.ok
    assert rows == 70


def test_the_sample_is_seeded(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[list[int]] = []
    features = Worker.features

    def noted(self: Worker, names: Any, rows: np.ndarray) -> Any:
        computed.append(rows.tolist())
        return features(self, names, rows)

    monkeypatch.setattr(Worker, "features", noted)
    for seed in (1, 1, 2):
        assert verify_deep(str(original), VerifyReport(), rows=3, seed=seed)[1] == 3
    one, again, other = computed
    assert len(set(one)) == 3
    assert one == again != other


def test_other_code_is_found(original: Path, out: Path) -> None:
    """All checksums are right, but the teacher that made the features computes something else by now."""
    code = original.parent / "toy.py"
    text = code.read_text()
    try:
        code.write_text(text.replace("patch.mean((2, 3))", "patch.amax((2, 3))"))
        assert kpu("verify", out).exit_code == 0
        assert_refused(kpu("verify", "--deep", out), "teacher 't'", "source_digest", "expected", "found")
    finally:
        code.write_text(text)


def test_a_teacher_is_configured_again_as_it_was(tmp_path: Path) -> None:
    images, out = write_images(tmp_path / "images", 3), tmp_path / "o.kpu"
    settings = ["weights=random", "layers=[-1, 2]", "input.size=32", "outputs=[global]"]
    arguments = [text for setting in settings for text in ("--set", f"teachers.v.{setting}")]
    extracted = kpu("extract", images, "-t", "v=timm:test_vit", *arguments, "-o", out, "--set", "seed=7")
    assert extracted.exit_code == 0, extracted.output
    spec = open_cache(out).teachers["v"].spec
    config = teacher_config(spec)
    assert (config.layers, config.outputs) == ((5, 2), ("global",))
    assert config.input is not None and config.input.size == (32, 32)
    report, rows = verify_deep(str(out), VerifyReport(), rows=3, seed=0)
    assert report.ok
    assert rows == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_longer_finite(original: Path, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    features = Worker.features

    def broken(self: Worker, names: Any, rows: np.ndarray) -> Any:
        digests, found = features(self, names, rows)
        for outputs in found.values():
            outputs["patch"][rows == 7, 0, 0] = value
        return digests, found

    monkeypatch.setattr(Worker, "features", broken)
    report, _ = verify_deep(str(original), VerifyReport(), rows=70, seed=0)
    assert {problem.file for problem in report.problems} == {
        "teachers/t/patch", "teachers/u/patch", "teachers/v/patch"
    }  # fmt: skip
    assert all("'007.png'" in problem.reason for problem in report.problems)


def test_images_that_are_gone(original: Path, tmp_path: Path) -> None:
    moved = original.parent / "images"
    moved.rename(tmp_path / "away")
    try:
        assert_refused(kpu("verify", "--deep", original), "images/0", "no such file", "set --images to where they are")
        assert "64 rows computed again" in kpu("verify", "--deep", "--images", tmp_path / "away", original).stdout
        assert_refused(kpu("verify", "--deep", "--images", moved, original), "--images", "found no folder")
        assert_refused(kpu("verify", "--images", tmp_path / "away", original), "--images", "expected with --deep")
    finally:
        (tmp_path / "away").rename(moved)
