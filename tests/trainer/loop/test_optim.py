"""The optimiser's groups, the schedule as a function of the step, and the half-life of the moving average."""

import math

import pytest
import torch
from torch import nn

from trainer.config import validate_config
from trainer.loop.optim import (
    clip_gradients,
    learning_rate,
    make_average,
    make_optimizer,
    make_schedule,
    optimizer_name,
)
from trainer.sections import OptimConfig


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_vectors_do_not_decay(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model.gamma = nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer(model, name, 1e-3, 0.1)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters() if decays[id(p)]} == {"0.weight": 0.1}
    assert len(decays) == 5


def test_the_rate_rises_for_a_share_of_the_steps_and_falls_along_a_cosine() -> None:
    optimizer = make_optimizer(nn.Linear(1, 1), "adamw", 1.0, 0.0)
    schedule = make_schedule(optimizer, 1.0, 0.1, 100)
    rates = []
    for step in range(100):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.01)
    assert rates[:11] == sorted(set(rates[:11]))
    expected = [0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(10, 100)]
    assert rates[10:] == pytest.approx(expected)


def test_muon_makes_every_direction_of_a_matrix_equally_long_and_leaves_vectors_to_nadamw() -> None:
    model = nn.Linear(8, 16)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = make_optimizer(model, "muon", 0.5, 0.0)
    directions, _ = torch.linalg.qr(torch.randn(16, 8))
    model.weight.grad = directions @ torch.diag(torch.logspace(0, -2, 8))  # singular values from 1 to 0.01
    model.bias.grad = torch.linspace(1, 3, 16)
    optimizer.step()
    # Newton-Schulz in bfloat16 brings singular values near 1; the rate is scaled by 0.2 sqrt(16).
    lengths = torch.linalg.svdvals(model.weight.detach() - before["weight"]) / (0.5 * 0.2 * 4)
    assert lengths.min() > 0.5 and lengths.max() < 1.5
    change = model.bias.detach() - before["bias"]  # a first step of NAdamW is as long for every size of gradient
    assert torch.allclose(change, change[:1], rtol=1e-3) and change[0] < 0


def test_auto_depends_on_the_kind_of_student() -> None:
    def auto(kind: str, **optim: float | str) -> tuple[str, float]:
        student = {"kind": kind, "model": "timm:vit_tiny_patch16_224" if kind == "full" else None}
        values = {"caches": ["a.kpu"], "base": "general", "student": student, "optim": optim}
        config = validate_config(values, "here")
        return optimizer_name(config), learning_rate(config)

    assert [auto(kind)[0] for kind in ("side", "frozen", "parallel", "full")] == ["muon", "muon", "adamw", "adamw"]
    assert auto("side")[1] > auto("full")[1]
    assert auto("side", lr=0.5, name="adamw") == ("adamw", 0.5)
    assert auto("full", lr=0.5, name="muon") == ("muon", 0.5)


def test_half_of_the_average_is_new_after_its_half_life() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    average = make_average(model, OptimConfig(ema=40.0), rows_per_step=4)
    assert average is not None
    with torch.no_grad():
        model.weight.fill_(1.0)
    for _ in range(10):
        average.update(model)
    assert average.module.weight.item() == pytest.approx(0.5, abs=1e-6)
    assert make_average(model, OptimConfig(), rows_per_step=4) is None


@pytest.mark.parametrize(("limit", "after"), [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_gradients_are_scaled_down_to_the_limit(limit: float, after: float) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], limit).item() == pytest.approx(5.0)
    assert parameter.grad.norm().item() == pytest.approx(after, rel=1e-5)
