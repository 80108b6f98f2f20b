"""One step of a training: batch normalisation over workers, a compiled student, a GPU that nobody waits for."""

import json
from copy import deepcopy
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from tests.trainer.conftest import BROKEN, Configure, Extract
from trainer.data.corpus import Corpus
from trainer.data.loading import DeviceTransfer
from trainer.data.targets import choose_outputs
from trainer.loop.fit import fit
from trainer.loop.pictures import with_images
from trainer.loop.training import Training, measure_gradients, synchronise
from trainer.loop.world import World
from trainer.model import Inheritance, Losses


def normalised() -> nn.Module:
    """As in timm's EfficientNet, whose normalisations hold the activations, and as in anyone's."""
    torch.manual_seed(0)
    own = BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Dropout2d)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), own, nn.Conv2d(4, 5, 1), nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()))
    for _ in range(3):
        model(torch.randn(8, 3, 4, 4))
    return model


def test_normalisations_over_workers_keep_their_activation_and_their_state() -> None:
    model = normalised()
    average = deepcopy(model).eval()  # a moving average is made before
    parameters = list(model.parameters())
    synchronise(model)
    _, own, _, (plain, _) = model
    assert isinstance(own, nn.SyncBatchNorm) and isinstance(plain, nn.SyncBatchNorm)
    assert isinstance(own.act, nn.SiLU) and isinstance(own.drop, nn.Dropout2d)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters], "those that the optimiser has"
    assert list(model.state_dict()) == list(average.state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model.eval()(x), average(x))
    average.load_state_dict(model.state_dict())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_student_learns_the_same_and_its_gradients_are_measured(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """`inductor` is what runs; `aot_eager` builds the same graphs, and generates no code."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    lines: dict[bool, list[dict[str, Any]]] = {}
    for compiled in (False, True):
        config = configure(compile=compiled, balance={"name": "dropping"}, validation=0, optim={"epochs": 1})
        fit(config, tmp_path / str(compiled))
        text = (tmp_path / str(compiled) / "metrics.jsonl").read_text()
        lines[compiled] = [json.loads(line) for line in text.splitlines()]
    assert len(lines[True]) == len(lines[False]) == 4
    for line, expected in zip(lines[True], lines[False], strict=True):
        assert min(line["gradient_norm"].values()) > 0
        for key in ("s2t", "gradient_norm"):
            assert line[key] == pytest.approx(expected[key], rel=1e-3)
        for name, others in expected["gradient_cosine"].items():
            assert line["gradient_cosine"][name] == pytest.approx(others, abs=1e-3)


def test_gradients_of_teachers_by_hand() -> None:
    """Losses a.x + c.y, b.x and d.y with a = (3, 0), b = (3, 4), c = (4), d = (2): squares 25, 25, 4; products 9, 8."""
    x, y = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    losses = {
        "one": x @ torch.tensor([3.0, 0.0]) + y @ torch.tensor([4.0]),
        "two": x @ torch.tensor([3.0, 4.0]),
        "three": y @ torch.tensor([2.0]),
        "none": 0 * y.sum(),
    }
    total = torch.stack(list(losses.values())).sum()
    norms, cosines = measure_gradients(Losses(total, losses, {}, total, {}, {"global": x, "patch": y}))
    assert {name: norm.item() for name, norm in norms.items()} == {"one": 5, "two": 5, "three": 2, "none": 0}
    found = {name: {other: value.item() for other, value in others.items()} for name, others in cosines.items()}
    assert found["one"] == pytest.approx({"two": 9 / 25, "three": 8 / 10, "none": 0})
    assert found["two"] == {"three": 0, "none": 0}
    assert found["three"] == {"none": 0}
    assert list(found) == ["one", "two", "three"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
def test_nobody_waits_for_a_gpu_within_a_step(configure: Configure, toys: Path, place: Path, extract: Extract) -> None:
    others = extract("others", general="toy", big="wider", shy="poisoned")
    config = configure(
        caches=[str(toys), str(others)],  # so that a batch has rows of two
        student={"kind": "full", "model": f"torch:{place}/toy.py:toy", "weights": "random"},
        unify={"mode": "joint"},
        balance={"name": "dropping"},
        preserve={"weight": 1.0},
        optim={"ema": 40.0},
    )
    world = World(0, 1, torch.device("cuda", 0), "bf16")
    corpus = Corpus(config.caches, choose_outputs(config), config.base, pinned=True)
    model = Inheritance(config, corpus.sources).to(world.device)
    rows = np.array([1, BROKEN, 80, 90])
    host = with_images(corpus.fetch, corpus, model.student, config)(rows, np.zeros_like(rows))
    training, upload = Training(config, model, world, 10), DeviceTransfer(corpus, world.device, model.student.input)
    training.advance([upload(host)], measure=False)
    try:
        torch.cuda.set_sync_debug_mode("error")
        training.advance([upload(host)], measure=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
