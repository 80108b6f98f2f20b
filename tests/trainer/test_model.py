"""The whole loss against its formula, what masked rows and absent teachers count, and the start at the base."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.conftest import BROKEN, RED, Configure
from trainer.config import TrainConfig
from trainer.data.corpus import Corpus
from trainer.data.loading import Batch, DeviceTransfer
from trainer.data.targets import choose_outputs
from trainer.loop.prepare import prepare_space
from trainer.loop.scores import score
from trainer.model import Inheritance

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("any_space")
MODES = ("off", "pretrained", "joint", "pca", "untrained")


def model_and_batch(config: TrainConfig, rows: np.ndarray | None = None) -> tuple[Inheritance, Batch]:
    corpus = Corpus(config.caches, choose_outputs(config), config.base)
    torch.manual_seed(config.seed)
    model = Inheritance(config, corpus.sources)
    upload = DeviceTransfer(corpus, CPU)

    def whole() -> Iterator[Batch]:
        while True:
            yield upload(corpus.fetch(np.arange(corpus.rows)))

    prepare_space(model, whole(), whole)
    return model, upload(corpus.fetch(np.arange(corpus.rows) if rows is None else rows))


def moved(model: Inheritance) -> Inheritance:
    """Away from the start, where the student is the base and gradients of the adapter are zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def pair(p: torch.Tensor, q: torch.Tensor) -> np.ndarray:
    """Half of 1 - cos and half of SmoothL1, by token, then the mean over tokens: float64 [B]."""
    a, b = (x.detach().double().numpy() for x in (p, q))
    cosine = (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-9)
    apart = np.abs(a - b)
    smooth = np.where(apart < 1, apart**2 / 2, apart - 0.5).mean(-1)
    loss = (1 - cosine) / 2 + smooth / 2
    return loss.mean(1) if loss.ndim == 2 else loss


@pytest.mark.parametrize("keep", [0.0, 2.0])
def test_the_loss_is_the_formula(configure: Configure, keep: float) -> None:
    config = configure(preserve={"weight": keep}, unify={"mode": "pretrained", "weight": 0.7})
    model, batch = model_and_batch(config)
    losses = moved(model)(batch)
    features = model.encode(batch)
    assert model.space is not None
    unified = model.space(batch.targets)
    rows = {}
    for name in model.teachers:
        direct = [pair(model.projectors(features, name)[o], batch.targets[name][o]) for o in config.outputs]
        back = [pair(features[o], unified[name][o]) for o in config.outputs]
        rows[name] = np.mean(direct, axis=0) + 0.7 * np.mean(back, axis=0)
    weights = {name: batch.weights[name].numpy() for name in model.teachers}
    counted = [row for row in range(len(batch)) if row != BROKEN]
    total = 0.0
    for row in counted:
        valid = [name for name in model.teachers if weights[name][row]]
        assert len(valid) == (2 if row == RED else 3)
        total += sum(rows[name][row] for name in valid) / len(valid) / len(counted)
    kept = np.mean([pair(features[o], batch.targets["general"][o])[counted].mean() for o in config.outputs])
    assert losses.preserve.item() == pytest.approx(kept, rel=1e-4)  # one minus a cosine near 1
    assert losses.total.item() == pytest.approx(total + keep * kept, rel=1e-5)


def gradients(model: Inheritance, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = model(batch).total
    total.backward()
    return total.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("balance", ["uniform", "dropping"])
@pytest.mark.parametrize("mode", MODES)
def test_masked_rows_count_for_nothing(configure: Configure, mode: str, balance: str) -> None:
    """The gradient of every parameter is what it is without the row, and whatever stands in the row."""
    config = configure(unify={"mode": mode}, balance={"name": balance}, preserve={"weight": 1.0})
    rows = np.array([BROKEN, 1, 2, 3, 4])
    model, batch = model_and_batch(config, rows)
    _, without = model_and_batch(config, rows[1:])
    noisy = {name: {o: x.clone() for o, x in outputs.items()} for name, outputs in batch.targets.items()}
    for outputs in noisy.values():
        for values in outputs.values():
            values[0] = 17.0
    moved(model).train()
    expected, wanted = gradients(model, without)
    for other in (batch, replace(batch, targets=noisy)):
        found, given = gradients(model, other)
        assert found == pytest.approx(expected, rel=1e-5)
        assert given.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(given[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_row_masked_for_one_teacher_counts_for_the_others(configure: Configure) -> None:
    model, batch = model_and_batch(configure(), np.array([RED]))
    losses = model(batch)
    assert losses.student_to_teacher["shy"].item() == 0
    two = [losses.student_to_teacher[name].item() for name in ("general", "big")]
    assert losses.total.item() == pytest.approx(np.mean(two), rel=1e-6)


def test_a_row_whose_base_is_masked_teaches_a_side_student_nothing(configure: Configure) -> None:
    model, batch = model_and_batch(configure(), np.array([1, 2, 3]))
    weights = {**batch.weights, "general": torch.tensor([1.0, 0.0, 1.0])}
    _, rest = model_and_batch(configure(), np.array([1, 3]))
    masked = replace(batch, weights=weights)
    assert model(masked).total.item() == pytest.approx(model(rest).total.item(), rel=1e-5)
    found, expected = (score(model, [each])["teachers"]["big"] for each in (masked, rest))
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_batch_of_masked_rows_alone_gives_zero(configure: Configure) -> None:
    model, batch = model_and_batch(configure(unify={"mode": "joint"}), np.array([BROKEN, BROKEN]))
    total, given = gradients(model.eval(), batch)
    assert total == 0
    assert not any(gradient.any() for gradient in given.values())


@pytest.mark.parametrize(
    "student",
    [{"kind": "side"}, {"kind": "side", "merge": "concat"}, {"kind": "frozen"}],
    ids=["add", "concat", "frozen"],
)
def test_the_student_begins_at_the_base(configure: Configure, student: dict[str, Any]) -> None:
    model, batch = model_and_batch(configure(student=student))
    features = model.encode(batch)
    for output in ("global", "patch"):
        base = batch.targets["general"][output]
        assert torch.equal(features[output][..., : base.shape[-1]], base)


@pytest.mark.parametrize("normalize", ["standardize", "raw", "phi-s"])
def test_predictions_are_standardised(configure: Configure, normalize: str, toys: Path) -> None:
    """A projector that gives the target itself predicts the standardised output, whatever the target is."""
    del toys
    config = configure(targets={"normalize": normalize}, outputs=["patch"])
    model, batch = model_and_batch(config)
    x = batch.targets["big"]["patch"]
    normalizer = model.normalizer("big", "patch")
    torch.testing.assert_close(normalizer.standardised(normalizer(x)), x, rtol=1e-4, atol=1e-4)


def test_equal_seeds_give_equal_models(configure: Configure) -> None:
    states = [model_and_batch(configure(seed=seed))[0].state_dict() for seed in (1, 1, 2)]
    same = [all(torch.equal(states[0][name], other[name]) for name in other) for other in states]
    assert same == [True, True, False]
