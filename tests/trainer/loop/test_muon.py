"""Matrices of one shape go through Muon together, and come out as by timm's own."""

from functools import partial
from typing import Any

import pytest
import timm
import timm.optim.muon as timm_muon
import torch
from packaging.version import Version
from torch import nn

from trainer.loop.muon import Muon
from trainer.loop.timm_optim import RELEASES, TimmMuon, is_matrix, orthogonalise, rate_scale


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleList(
        [nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8), nn.Conv2d(4, 8, 2), nn.Conv2d(1, 8, 3), nn.LayerNorm(8)]
    )


def trained(kind: type[torch.optim.Optimizer], steps: int = 5, **options: Any) -> dict[str, torch.Tensor]:
    model = model_of()
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.05, momentum=0.9, nesterov=True, **options)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for number, parameter in enumerate(model.parameters()):
            unused = step == 2 and number == 0
            parameter.grad = None if unused else torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"ns_coefficients": "original", "ns_steps": 3}], ids=["default", "others"])
def test_steps_are_those_of_timm_in_float32(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    own = trained(Muon, **options)
    exact = partial(timm_muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(timm_muon, "zeropower_via_newtonschulz", exact)
    expected = trained(timm_muon.Muon, **options)
    for name, value in own.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
        assert not torch.equal(value, dict(model_of().named_parameters())[name])


def test_its_state_is_that_of_timm() -> None:
    states = []
    for kind in (Muon, timm_muon.Muon):
        model = model_of()
        optimizer = kind(model.parameters(), nesterov=True)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        states.append({number: sorted(state) for number, state in optimizer.state_dict()["state"].items()})
    assert states[0] == states[1]


def test_the_adapter_fits_the_installed_release_of_timm() -> None:
    first, end = (Version(release) for release in RELEASES)
    assert first <= Version(timm.__version__) < end
    matrix, bias = torch.zeros(4, 8), torch.zeros(8)
    assert is_matrix(matrix) and not is_matrix(bias)
    group = TimmMuon([nn.Parameter(matrix)], lr=0.1).param_groups[0]
    torch.manual_seed(0)
    found = orthogonalise(torch.randn(1, 4, 8), group, torch.float32)[0]
    assert torch.linalg.matrix_norm(found @ found.T - torch.eye(4)) < 1
    assert rate_scale((4, 8), group) > 0
