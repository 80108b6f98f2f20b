"""Targets from teachers that run beside the training are the cached ones, within the codec's bound."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from cli import live
from cli.live import run_teachers
from kpu import open_cache
from kpu.errors import MismatchError
from pipeline.teachers import FrozenTeacher, load_shipped
from tests.support.toys import TOY, kpu, write_images, write_teacher
from trainer.config import validate_config
from trainer.data.corpus import Corpus
from trainer.data.loading import DeviceTransfer, Drawn
from trainer.data.targets import choose_outputs
from trainer.loop.batches import open_loader
from trainer.model import Inheritance

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two caches of 3 views an image, the second one without the teacher `shy`; one broken image, one for which
    `shy` gives NaN.
    """
    place = tmp_path_factory.mktemp("live")
    model = write_teacher(place)
    for name, teachers in (
        ("one", ["general=toy", "big=wider", "shy=poisoned"]),
        ("two", ["general=toy", "big=wider"]),
    ):
        images = write_images(place / name, 30)
        (images / "003.png").write_bytes(b"not an image")
        Image.new("RGB", (8, 8), (255, 0, 0)).save(images / "005.png")
        chosen = [f"--teacher={teacher.replace('=', f'={model}:')}" for teacher in teachers]
        options = ["views=3", "unit_rows=64", "executor.threads=1", "allow_nonfinite=true"]
        result = kpu("extract", images, *chosen, *(f"--set={o}" for o in options), "-o", place / f"{name}.kpu")
        assert result.exit_code == 0, result.output
    return place


def values(place: Path) -> dict[str, Any]:
    return {
        "caches": [str(place / "one.kpu"), str(place / "two.kpu")],
        "base": "general",
        "student": {"width": 8, "depth": 1},
        "projector": {"hidden": 8},
        "targets": {"source": "live"},
        "optim": {"epochs": 1},
        "log": {"every": 1},
        "batch_size": 16,
        "device": "cpu",
        "threads": 1,
    }


def test_live_targets_are_the_cached_ones_within_half_a_step(place: Path) -> None:
    config = validate_config(values(place), "test")
    corpus = Corpus(config.caches, choose_outputs(config), config.base)
    fetch = run_teachers(corpus, config, corpus.fetch)
    cached, raw = DeviceTransfer(corpus, CPU), DeviceTransfer(corpus, CPU, raw=True)
    rows = np.random.default_rng(0).permutation(corpus.rows)
    largest = 0.0
    for part in np.array_split(rows, 6):
        epochs = np.zeros_like(part)
        a, b = cached(corpus.fetch(part, epochs)), raw(fetch(part, epochs))
        for name in corpus.wanted:
            assert torch.equal(a.weights[name], b.weights[name])
            for output in corpus.wanted[name]:
                # Of the first cache's standard deviations, which those of the second may be wider than.
                bound = 0.5 * _coarsest(corpus, name, output) + 1e-4
                apart = (a.targets[name][output] - b.targets[name][output]).abs()
                assert (apart <= torch.from_numpy(bound)).all()
                assert torch.isfinite(b.targets[name][output]).all()
                largest = max(largest, float(apart.max()))
    assert largest > 1e-3  # else both came from the cache


def _coarsest(corpus: Corpus, name: str, output: str) -> np.ndarray:
    std = corpus.sources[name].statistics[output].std
    grids = [cache.teachers[name].grid(output) for cache in corpus.caches if name in cache.teachers]
    return np.max([grid.scale / std for grid in grids], axis=0).astype(np.float32)


def test_images_come_beside_live_targets_where_they_are_looked_at(place: Path) -> None:
    student = {"kind": "full", "model": f"torch:{place}/toy.py:toy", "weights": "random"}
    config = validate_config({**values(place), "student": student}, "test")
    corpus = Corpus(config.caches, choose_outputs(config), config.base)
    model = Inheritance(config, corpus.sources)
    drawn = Drawn(np.array([1, 120]), np.array([0, 0]), 2)
    with open_loader(config, corpus, model, run_teachers) as loader:
        (_, seen), (_, unseen) = (next(loader.load(iter([drawn]), images=images)) for images in (True, False))
    assert unseen.images is None
    assert seen.images is not None and seen.images.flatten(1).any(dim=1).all()
    expected = run_teachers(corpus, config, corpus.fetch)(drawn.rows, drawn.epochs).stored
    for host in (seen, unseen):
        assert all(torch.equal(host.stored[key], stored) for key, stored in expected.items())


@pytest.mark.parametrize(("device", "expected"), [("auto", "cuda:3"), ("cpu", "cpu")])
def test_teachers_run_on_the_gpu_of_this_process(
    device: str, expected: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads begin with the first GPU; where there are several, that is another process's."""
    config = validate_config({**values(place), "device": device}, "test")
    corpus = Corpus(config.caches, choose_outputs(config), config.base)
    built, chosen = [], []

    def build(*arguments: Any, device: str, **options: Any) -> FrozenTeacher:
        built.append(device)
        return load_shipped(*arguments, device="cpu", **options)

    monkeypatch.setattr(live, "load_shipped", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    fetch = run_teachers(corpus, config, corpus.fetch)
    fetch(np.array([0]), np.array([0]))
    assert set(built) == {expected}
    assert chosen == ([expected] if expected != "cpu" else [])


def test_a_training_on_live_targets_goes_as_on_cached_ones(place: Path, tmp_path: Path) -> None:
    from cli.train import app

    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values(place)))
    losses = {}
    for source in ("live", "cache"):
        out = tmp_path / source
        command = ["fit", "-c", str(tmp_path / "train.yaml"), "-o", str(out), "--set", f"targets.source={source}"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        lines = [yaml.safe_load(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[source] = [line["loss"] for line in lines if "loss" in line]
    assert losses["live"] == pytest.approx(losses["cache"], rel=0.05)
    assert losses["live"] != losses["cache"]


def test_another_teacher_than_the_extracted_one_is_refused(place: Path) -> None:
    file = place / "toy.py"
    config = validate_config(values(place), "test")
    corpus = Corpus(config.caches, choose_outputs(config), config.base)
    file.write_text(TOY.replace("manual_seed(0)", "manual_seed(1)"))
    try:
        with pytest.raises(MismatchError, match=r"weights_digest|source_digest"):
            run_teachers(corpus, config, corpus.fetch)
    finally:
        file.write_text(TOY)
    assert open_cache(config.caches[0]).teachers.keys() >= {"general"}
