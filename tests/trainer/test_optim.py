"""The optimiser's groups, the schedule as a function of the step, and the half-life of the moving average."""

import math

import pytest
import torch
from torch import nn

from trainer.config import OptimConfig, validate_config
from trainer.optim import clip_gradients, learning_rate, make_average, make_optimizer, make_schedule


def test_vectors_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model.gamma = nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer(model, 1e-3, 0.1)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters() if decays[id(p)]} == {"0.weight": 0.1}
    assert len(decays) == 5


def test_the_rate_rises_for_a_share_of_the_steps_and_falls_along_a_cosine() -> None:
    optimizer = make_optimizer(nn.Linear(1, 1), 1.0, 0.0)
    schedule = make_schedule(optimizer, 1.0, 0.1, 100)
    rates = []
    for step in range(100):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.01)
    assert rates[:11] == sorted(set(rates[:11]))
    expected = [0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(10, 100)]
    assert rates[10:] == pytest.approx(expected)


def test_auto_depends_on_the_kind_of_student() -> None:
    def rate(kind: str, **optim: float) -> float:
        student = {"kind": kind, "model": "timm:vit_tiny_patch16_224" if kind == "full" else None}
        values = {"caches": ["a.kpu"], "base": "general", "student": student, "optim": optim}
        return learning_rate(validate_config(values, "here"))

    assert rate("side") > rate("full")
    assert rate("side", lr=0.5) == rate("full", lr=0.5) == 0.5


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
