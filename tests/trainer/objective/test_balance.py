"""Random numbers by counter, and which teacher counts in which row."""

import numpy as np
import pytest
import torch

from trainer.objective.balance import coefficients, uniforms
from trainer.sections import BalanceConfig

DROPPING = BalanceConfig(name="dropping", p=0.5)


def test_golden_uniforms() -> None:
    numbers = uniforms(7, 0, np.array([0, 1, 2, 2**62]), "dino")
    assert numbers.tolist() == [0.04346192240940583, 0.17354172041402105, 0.5636003632019966, 0.9936746410776671]
    assert uniforms(7, 1, np.array([0]), "dino").tolist() == [0.9040129377109489]


def test_uniforms_belong_to_the_row_and_not_to_its_place() -> None:
    rows = np.random.default_rng(0).integers(0, 10**9, 100)
    numbers = uniforms(1, 2, rows, "clip")
    assert np.array_equal(uniforms(1, 2, rows[::-1].copy()[:50], "clip"), numbers[::-1][:50])


def test_uniforms_are_uniform_and_unrelated() -> None:
    rows = np.arange(20_000)
    drawn = np.stack(
        [uniforms(*key) for key in ((0, 0, rows, "a"), (1, 0, rows, "a"), (0, 1, rows, "a"), (0, 0, rows, "b"))]
    )
    assert drawn.dtype == np.float64
    assert drawn.min() >= 0
    assert drawn.max() < 1
    cells = np.stack([np.histogram(numbers, bins=20, range=(0, 1))[0] for numbers in drawn])
    assert (((cells - 1000) ** 2 / 1000).sum(1) < 50).all()  # chi-square with 19 degrees of freedom
    lagged = np.corrcoef(np.concatenate([drawn[:, 1:], drawn[:1, :-1]])) - np.eye(5)
    assert np.abs(lagged).max() < 5 / np.sqrt(20_000)


def test_uniform_counts_the_valid() -> None:
    valid = torch.tensor([[True, False], [False, False], [True, True]])
    c = coefficients(BalanceConfig(), torch.rand(3, 2), valid, None)
    assert c.dtype == torch.float32
    assert c.tolist() == [[1, 0], [0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("losses", "valid", "randoms", "expected"),
    [
        ([3.0, 2.0, 1.0], [1, 1, 1], [0.0, 0.0, 0.0], [1, 0, 0]),  # the largest stays, others fall
        ([1.0, 2.0, 3.0], [1, 1, 1], [0.49, 0.5, 0.0], [0, 1, 1]),  # at p and above it counts
        ([1.0, 2.0, 9.0], [1, 1, 0], [0.0, 0.0, 0.9], [0, 1, 0]),  # largest of the valid
        ([torch.nan, 2.0, torch.inf], [0, 1, 0], [0.9, 0.0, 0.9], [0, 1, 0]),  # whatever stands in the invalid
        ([2.0, 2.0, 2.0], [0, 1, 1], [0.0, 0.0, 0.0], [0, 1, 0]),  # the first of equals
        ([1.0, 2.0, 3.0], [0, 0, 0], [0.9, 0.9, 0.9], [0, 0, 0]),  # nothing valid
    ],
)
def test_dropping_by_hand(losses: list[float], valid: list[int], randoms: list[float], expected: list[int]) -> None:
    c = coefficients(DROPPING, torch.tensor([losses]), torch.tensor([valid]).bool(), torch.tensor([randoms]))
    assert c.tolist() == [expected]


@pytest.mark.parametrize(("p", "others"), [(0.0, 1.0), (0.3, 0.7), (1.0, 0.0)])
def test_others_count_with_probability_one_less_p(p: float, others: float) -> None:
    rows = np.arange(20_000)
    randoms = torch.from_numpy(np.stack([uniforms(0, 0, rows, name) for name in "abc"], axis=1))
    losses = torch.tensor([1.0, 3.0, 2.0]).expand(len(rows), 3)
    shares = coefficients(BalanceConfig(name="dropping", p=p), losses, torch.ones_like(losses).bool(), randoms).mean(0)
    assert shares[1] == 1
    assert torch.allclose(shares[[0, 2]], torch.tensor(others), atol=5 * 0.5 / 20_000**0.5 if 0 < p < 1 else 0)
