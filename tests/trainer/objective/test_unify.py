"""The terms of the space's objective, masked rows, freezing, and the modes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kpu.errors import ConfigError, MismatchError
from trainer.data.shapes import OutputShape
from trainer.objective.losses import covariance_term, resize_map, row_loss, variance_term
from trainer.objective.pca import PcaSpace
from trainer.objective.spaces import make_space
from trainer.objective.unify import LearnedSpace
from trainer.sections import LossConfig, UnifyConfig

SHAPES = {
    "base": {"global": OutputShape(6), "patch": OutputShape(6, (3, 3))},
    "fine.v1": {"global": OutputShape(4), "patch": OutputShape(4, (5, 5))},
    "coarse": {"patch": OutputShape(5, (2, 2))},
}
Features = dict[str, dict[str, Tensor]]


def batch(rows: int = 40, seed: int = 0) -> tuple[Features, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, 1, 3, generator=generator)
    targets: Features = {}
    for name, outputs in SHAPES.items():
        targets[name] = {}
        for output, shape in outputs.items():
            x = latent @ torch.randn(3, shape.channels, generator=torch.Generator().manual_seed(len(name)))
            x = x + 0.3 * torch.randn(rows, shape.tokens, shape.channels, generator=generator)
            targets[name][output] = x[:, 0] if shape.grid is None else x
    return targets, {name: torch.ones(rows) for name in SHAPES}


def space(mode: Any = "pretrained", **changes: Any) -> LearnedSpace:
    made = make_space(UnifyConfig(mode=mode, hidden=8, **changes), "base", SHAPES, 3)
    assert isinstance(made, LearnedSpace)
    return made


def pca() -> PcaSpace:
    made = make_space(UnifyConfig(mode="pca", pca_rows=200), "base", SHAPES, 3)
    assert isinstance(made, PcaSpace)
    return made


def test_a_space_that_is_off_or_weighs_nothing_is_not_made() -> None:
    for mode in ("off", "pretrained", "joint", "pca", "untrained"):
        assert make_space(UnifyConfig(mode=mode, weight=0), "base", SHAPES, 3) is None
    assert make_space(UnifyConfig(mode="off"), "base", SHAPES, 3) is None


def masked(rows: int = 40) -> tuple[Features, dict[str, Tensor], dict[str, Tensor]]:
    """Targets whose first rows are masked, differently by teacher, their weights, and the base as the anchor."""
    targets, weights = batch(rows)
    for i, name in enumerate(SHAPES, 1):
        weights[name][:i] = 0
    return targets, weights, {o: x.clone() for o, x in targets["base"].items()}


def with_junk(targets: Features, weights: dict[str, Tensor]) -> Features:
    return {
        name: {
            o: torch.where(weights[name].view(-1, *[1] * (x.dim() - 1)) > 0, x, torch.full_like(x, 100.0))
            for o, x in outputs.items()
        }
        for name, outputs in targets.items()
    }


def test_off_is_nothing() -> None:
    assert make_space(UnifyConfig(), "base", SHAPES, 0) is None


def test_shapes_are_the_bases_and_the_base_is_its_own() -> None:
    targets, weights = batch()
    fitted = pca()
    fitted.fit([batch(100, 1), batch(100, 2)])
    for made in (space(), space("joint"), space("untrained"), fitted):
        u = made(targets, weights)
        assert {n: set(x) for n, x in u.items()} == {n: set(x) for n, x in SHAPES.items()}
        assert all(x.shape == targets["base"][o].shape for outputs in u.values() for o, x in outputs.items())
        assert all(torch.equal(u["base"][o], x) for o, x in targets["base"].items())


def test_terms_by_hand() -> None:
    made = space(reconstruction=2.0, variance=3.0, covariance=0.5)
    targets, weights = batch()
    anchor = {o: x * 0.5 for o, x in targets["base"].items()}
    u, terms = made.learn(anchor, targets, weights)
    assert set(terms) == {"anchor", "reconstruction", "variance", "covariance"}
    loss, ones = LossConfig(), torch.ones(40)

    def by_hand(teacher: str, output: str, target: Tensor, grid: tuple[int, int] | None) -> list[Tensor]:
        name = f"{teacher}:{output}".replace(".", "/")
        h = made.maps[name](target)
        mean, variance = h.reshape(-1, 6).mean(0), h.reshape(-1, 6).var(0, correction=0)
        v = (h - mean) / (variance + 1e-5).sqrt()
        placed = v if grid is None else resize_map(v, grid, (3, 3))
        torch.testing.assert_close(u[teacher][output], placed, rtol=1e-4, atol=1e-4)
        return [
            row_loss(placed, anchor[output], loss).mean(),
            2.0 * row_loss(made.decoders[name](v), target, loss).mean(),
            3.0 * variance_term(variance),
            0.5 * covariance_term(v, ones),
        ]

    fine = by_hand("fine.v1", "global", targets["fine.v1"]["global"], None)
    finer = by_hand("fine.v1", "patch", resize_map(targets["fine.v1"]["patch"], (5, 5), (3, 3)), (3, 3))
    coarse = by_hand("coarse", "patch", targets["coarse"]["patch"], (2, 2))
    for i, name in enumerate(("anchor", "reconstruction", "variance", "covariance")):
        expected = ((fine[i] + finer[i]) / 2 + coarse[i]) / 2
        torch.testing.assert_close(terms[name], expected, rtol=1e-4, atol=1e-5)


def test_terms_of_weight_0_are_left_out() -> None:
    targets, weights = batch()
    made = space(reconstruction=0, variance=0, covariance=0)
    assert set(made.objective(targets["base"], targets, weights)) == {"anchor"}
    assert made.restorations(targets) == {}


def test_no_gradient_into_the_anchor_but_into_every_map() -> None:
    targets, weights = batch()
    anchor = {o: x.clone().requires_grad_() for o, x in targets["base"].items()}
    made = space("joint")
    sum(made.objective(anchor, targets, weights).values()).backward()  # type: ignore[union-attr]
    assert all(x.grad is None for x in anchor.values())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


def test_masked_rows_influence_nothing() -> None:
    targets, weights, anchor = masked()
    results = []
    for data, drawn in ((targets, anchor), (with_junk(targets, weights), with_junk({"base": anchor}, weights)["base"])):
        made = space()
        u, terms = made.learn(drawn, data, weights)
        sum(terms.values()).backward()  # type: ignore[union-attr]
        state = [*made.state_dict().values(), *(p.grad for p in made.parameters() if p.grad is not None)]
        rows = [u[name][o][weights[name] > 0] for name in made.specialists for o in u[name]]
        results.append([*terms.values(), *state, *rows])
    for clean, junk in zip(*results, strict=True):
        torch.testing.assert_close(clean, junk, rtol=1e-4, atol=1e-5)
    # The same holds if they are not there at all.
    kept = weights["coarse"] > 0
    only = {n: {o: x[kept] for o, x in outputs.items()} for n, outputs in targets.items()}
    everyone = dict.fromkeys(weights, kept.float())
    whole = space().objective(anchor, targets, everyone)
    part = space().objective({o: x[kept] for o, x in anchor.items()}, only, {n: torch.ones(37) for n in weights})
    for name in whole:
        torch.testing.assert_close(whole[name], part[name], rtol=1e-4, atol=1e-5)


def test_a_batch_without_rows_gives_finite_terms() -> None:
    targets, weights = batch()
    terms = space().objective(targets["base"], targets, {name: torch.zeros_like(w) for name, w in weights.items()})
    assert all(term.isfinite() for term in terms.values())
    assert terms["anchor"] == 0 and terms["covariance"] == 0


def test_without_weights_nothing_moves() -> None:
    made, (targets, weights) = space("joint"), batch()
    made(targets, weights)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    first, again = made(targets), made(targets)
    assert torch.equal(first["coarse"]["patch"], again["coarse"]["patch"])
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())


def test_frozen_in_training_mode_and_after_loading() -> None:
    made, (targets, weights) = space(), batch()
    made(targets, weights)
    made.freeze()
    before = made.norms["coarse:patch"].variance.clone()
    u = made.train()(batch(seed=5)[0], weights)
    assert not any(x.requires_grad for outputs in u.values() for x in outputs.values())
    assert torch.equal(made.norms["coarse:patch"].variance, before)
    other = space()
    other.load_state_dict(made.state_dict())
    assert other.frozen and not any(p.requires_grad for p in other.parameters())
    torch.testing.assert_close(other(targets, weights), made(targets))


def test_untrained_learns_nothing_but_its_statistics() -> None:
    made, (targets, weights) = space("untrained"), batch()
    u, terms = made.learn(targets["base"], targets, weights)
    assert terms == {} and not any(p.requires_grad for p in made.parameters())
    np.testing.assert_allclose(u["fine.v1"]["patch"].flatten(0, 1).var(0, correction=0), 1, rtol=0.01)
    assert not torch.equal(made.norms["coarse:patch"].variance, torch.ones(6))


def test_the_seed_alone_draws_the_maps() -> None:
    torch.manual_seed(1)
    first, state = space(), torch.random.get_rng_state()
    second = space()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_pretraining_brings_u_to_the_base() -> None:
    made, (targets, weights) = space(), batch(128)
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    course = []
    for _ in range(60):
        terms = made.objective(targets["base"], targets, weights)
        optimizer.zero_grad()
        sum(terms.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        course.append({name: term.item() for name, term in terms.items()})
    assert course[-1]["anchor"] < 0.5 * course[0]["anchor"]
    assert course[-1]["reconstruction"] < 0.7 * course[0]["reconstruction"]


def test_pca_is_one_u_for_all_near_the_base_and_of_unit_variance() -> None:
    made = pca()
    with pytest.raises(RuntimeError, match="fit"):
        made(batch()[0])
    made.fit([batch(100, 1), batch(100, 2), batch(100, 3)])
    targets, weights = batch(400, 4)
    u = made(targets, weights)
    assert u["fine.v1"]["patch"] is u["coarse"]["patch"]
    x = u["coarse"]["patch"]
    np.testing.assert_allclose(x.flatten(0, 1).var(0), 1, atol=0.35)
    base, loss = targets["base"]["patch"], LossConfig()
    assert row_loss(x, base, loss).mean() < 0.5 * row_loss(x, base.roll(1, 0), loss).mean()
    restored, target = made.restorations(targets)["coarse"]["patch"]
    assert target.shape == (400, 9, 5)
    assert (restored - target).square().mean() < 0.5 * target.var()
    assert made.objective(targets["base"], targets, weights) == {}


def test_pca_leaves_masked_rows_out() -> None:
    targets, weights, _ = masked(100)
    clean, junk = pca(), pca()
    clean.fit([(targets, weights)])
    spoiled = with_junk(targets, weights)
    junk.fit([(spoiled, weights)])
    torch.testing.assert_close(clean.state_dict(), junk.state_dict())
    kept = weights["base"] > 0  # what the specialists mask among these must not reach the shared u
    for output in ("global", "patch"):
        torch.testing.assert_close(
            clean(targets, weights)["fine.v1"][output][kept], junk(spoiled, weights)["fine.v1"][output][kept]
        )


def test_pca_refuses_too_few_vectors() -> None:
    with pytest.raises(ConfigError, match=r"unify\.pca_rows: expected at least 10 vectors of 'global'.* found 9"):
        pca().fit([batch(9)])


def test_pca_of_a_loaded_state() -> None:
    made, other = pca(), pca()
    made.fit([batch(100)])
    other.load_state_dict(made.state_dict())
    torch.testing.assert_close(other(batch()[0]), made(batch()[0]))


def test_a_specialist_with_an_output_that_the_base_lacks_is_refused() -> None:
    shapes = {"base": {"global": OutputShape(3)}, "a": {"patch": OutputShape(3, (2, 2))}}
    with pytest.raises(MismatchError, match=r"teacher 'a', patch: .* of the base 'base', found none"):
        make_space(UnifyConfig(mode="pretrained"), "base", shapes, 0)
