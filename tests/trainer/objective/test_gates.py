"""Figures against numpy, and a joint space driven into collapse on purpose."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kpu.errors import MismatchError
from trainer.data.shapes import OutputShape
from trainer.objective.gates import GateFigures, GateReport, check_gates, measure_gates
from trainer.objective.losses import row_loss
from trainer.objective.spaces import make_space
from trainer.objective.unify import SharedSpace
from trainer.sections import LossConfig, UnifyConfig

SQUARED = LossConfig(cosine=0, smooth_l1=0, mse=1)
SOUND = GateFigures(0.3, 0.9, 0.1, 12.0, 32, 0.8, 0.7, 2048)
Features = dict[str, dict[str, Tensor]]


def correlated(rows: int = 256) -> Features:
    """A base and two specialists that share one direction; the rest of each is its own."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(rows, 1, generator=generator)
    made: Features = {}
    for name, channels in (("base", 32), ("left", 12), ("right", 20)):
        own = torch.randn(rows, 6, generator=generator)
        y = torch.cat([2 * shared, own], 1) @ torch.randn(7, channels, generator=generator)
        made[name] = {"global": (y - y.mean(0)) / y.std(0)}
    return made


def learn(config: UnifyConfig, targets: Features, *, steps: int, keep: float) -> SharedSpace:
    """A joint space trained with a student that is `keep` times drawn to the base."""
    shapes = {name: {"global": OutputShape(x["global"].shape[1])} for name, x in targets.items()}
    weights = {name: torch.ones(len(x["global"])) for name, x in targets.items()}
    space = make_space(config, "base", shapes, 0)
    assert space is not None
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    optimizer = torch.optim.Adam([*space.parameters(), *student.parameters()], lr=1e-2)
    base, loss = targets["base"]["global"], LossConfig()
    for _ in range(steps):
        z = student(base)
        u, terms = space.learn({"global": z}, targets, weights)
        total = sum(terms.values()) + keep * row_loss(z, base, loss).mean()
        for name in space.specialists:
            total = total + row_loss(z, u[name]["global"].detach(), loss).mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return space


def gate(space: SharedSpace, targets: Features) -> GateReport:
    return measure_gates(space, [(targets, {name: torch.ones(len(x["global"])) for name, x in targets.items()})])


def test_joint_without_its_guards_collapses_and_is_refused() -> None:
    targets = correlated()
    bare = UnifyConfig(mode="joint", hidden=32, variance=0, covariance=0, reconstruction=0)
    report = gate(learn(bare, targets, steps=150, keep=0), targets)
    for teacher in ("left", "right"):
        assert report.figures[teacher]["global"].reconstruction is None
        assert report.figures[teacher]["global"].effective_rank < 1.62
    found = report.figures["left"]["global"].effective_rank
    with pytest.raises(MismatchError) as refused:
        check_gates(report, bare)
    assert "teacher 'left', global" in str(refused.value) and "teacher 'right', global" in str(refused.value)
    wanted = f"expected an effective rank of at least 1.62 of 32 channels (unify.lowest_rank 0.02), found {found:.2f}"
    assert wanted in str(refused.value)

    guarded = UnifyConfig(mode="joint", hidden=32)
    report = gate(learn(guarded, targets, steps=150, keep=1), targets)
    check_gates(report, guarded)
    assert min(figures["global"].effective_rank for figures in report.figures.values()) > 3


class Given(SharedSpace):
    """A space whose u are the targets themselves, read back with an error of 1."""

    def forward(self, targets, weights=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        return {name: dict(outputs) for name, outputs in targets.items()}

    def restorations(self, targets):  # type: ignore[no-untyped-def]
        return {name: {"patch": (targets[name]["patch"] + 1, targets[name]["patch"])} for name in self.specialists}


def test_figures_against_numpy_without_masked_rows() -> None:
    rng = np.random.default_rng(0)
    wide = {name: rng.normal(0, scale, (12, 4, 3)) for name, scale in (("base", 1), ("a", 2), ("b", 3))}
    weights = {name: np.ones(12) for name in wide}
    for name, row in (("base", 2), ("a", 5), ("b", 7)):
        weights[name][row] = 0
        wide[name][row] = 1e3
    shapes = {name: {"patch": OutputShape(3, (2, 2))} for name in wide}
    space = Given(UnifyConfig(mode="joint"), "base", shapes)
    targets = {name: {"patch": torch.tensor(x, dtype=torch.float32)} for name, x in wide.items()}
    weights_B = {name: torch.tensor(w, dtype=torch.float32) for name, w in weights.items()}
    halves = [
        ({n: {"patch": t["patch"][cut]} for n, t in targets.items()}, {n: w[cut] for n, w in weights_B.items()})
        for cut in (slice(0, 6), slice(6, 12))
    ]
    report = measure_gates(space, halves, SQUARED)
    figures = report.figures["a"]["patch"]
    valid = (weights["base"] > 0) & (weights["a"] > 0)
    u, z, other = wide["a"][valid], wide["base"][valid], wide["b"][valid]
    assert figures.distance == pytest.approx(((u - z) ** 2).mean(), rel=1e-5)
    shares = np.stack([np.ones(len(u)), np.ones(len(u)), weights["b"][valid]])[:, :, None, None]
    middle = (shares * np.stack([u, z, other])).sum(0) / shares.sum(0)
    assert figures.floor == pytest.approx(((u - middle) ** 2).mean(), rel=1e-5)
    covariance = np.cov(u.reshape(-1, 3).T, bias=True)
    eigenvalues = np.linalg.eigvalsh(covariance)
    p = eigenvalues / eigenvalues.sum()
    assert figures.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert figures.lowest_std == pytest.approx(np.sqrt(np.diag(covariance).min()), rel=1e-5)
    vectors = wide["a"][weights["a"] > 0].reshape(-1, 3)
    assert figures.reconstruction == pytest.approx((1 - 1 / vectors.var(0)).mean(), rel=1e-4)
    assert report.flat()["a/patch/distance"] == figures.distance


def test_chance_is_that_of_other_rows() -> None:
    shapes = {name: {"global": OutputShape(1)} for name in ("base", "a")}
    space = Given(UnifyConfig(), "base", shapes)
    space.restorations = lambda _: {}  # type: ignore[method-assign]
    x = {name: {"global": torch.tensor([[0.0], [1.0], [5.0]])} for name in shapes}
    figures = measure_gates(space, [(x, {name: torch.ones(3) for name in shapes})], SQUARED).figures["a"]["global"]
    assert figures.distance == 0 and figures.chance == pytest.approx((25 + 1 + 16) / 3)
    one = {name: {"global": torch.ones(1, 1)} for name in shapes}
    alone = measure_gates(space, [(one, {name: torch.ones(1) for name in shapes})], SQUARED).figures["a"]["global"]
    assert np.isnan(alone.chance)
    with pytest.raises(MismatchError, match="teacher 'a', global: expected rows that it shares with the base 'base'"):
        measure_gates(space, [(one, {"base": torch.ones(1), "a": torch.zeros(1)})], SQUARED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"effective_rank": 1.5}, "rank of at least 1.62 of 32 channels .* found 1.50"),
        ({"effective_rank": float("nan")}, "found nan"),
        ({"lowest_std": 0.05}, r"standard deviation of at least 0.1 .* found 0.05"),
        ({"reconstruction": 0.05}, r"reconstruction R2 of at least 0.1 .* found 0.050"),
        ({"distance": 0.95}, "distance to the base below 0.900, .* found 0.950"),
        ({"distance": float("inf")}, "finite distance to the base, found inf"),
    ],
)
def test_each_gate_names_teacher_output_figure_and_limit(change: dict[str, float], message: str) -> None:
    report = GateReport({"good": {"global": SOUND}, "bad": {"patch": replace(SOUND, **change)}})
    with pytest.raises(MismatchError, match=f"unify: .*teacher 'bad', patch: expected .*{message}") as refused:
        check_gates(report, UnifyConfig(mode="joint"))
    assert "good" not in str(refused.value) and "unify.mode pca" in str(refused.value)


@pytest.mark.parametrize(
    ("gate_change", "passes", "fails"),
    [
        ({"reconstruction": None}, UnifyConfig(), None),
        ({"chance": float("nan")}, UnifyConfig(), None),
        ({"distance": 1.0}, UnifyConfig(mode="untrained"), UnifyConfig(mode="joint")),
        ({"effective_rank": 1.2, "vectors": 6}, UnifyConfig(), None),
    ],
)
def test_sound_and_unmeasurable_spaces_pass(
    gate_change: dict[str, Any], passes: UnifyConfig, fails: UnifyConfig | None
) -> None:
    report = GateReport({"a": {"global": SOUND, "patch": replace(SOUND, **gate_change)}})
    check_gates(report, passes)  # raises otherwise
    with pytest.raises(MismatchError, match="teacher 'a'"):
        check_gates(GateReport({"a": {"global": replace(SOUND, lowest_std=0.0)}}), UnifyConfig(mode="joint"))
    if fails is not None:
        with pytest.raises(MismatchError, match="teacher 'a', patch"):
            check_gates(report, fails)


def test_measuring_leaves_the_space_as_it_was() -> None:
    targets = correlated(32)
    space = learn(UnifyConfig(mode="joint", hidden=8), targets, steps=2, keep=1)
    before = {name: value.clone() for name, value in space.state_dict().items()}
    gate(space, targets)
    assert space.training and all(torch.equal(before[name], value) for name, value in space.state_dict().items())
