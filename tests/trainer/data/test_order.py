"""Orders are permutations, pinned by golden values, and blind to how they are cut."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import FullOrder, Order, WindowedOrder, make_order, scramble
from trainer.sections import OrderConfig

STARTS = [0, 3, 5, 9, 10, 14]
SEEDS = st.integers(0, 2**63 - 1)


def test_scramble_is_splitmix64() -> None:
    """The first outputs of the published generator at seed 0."""
    step = 0x9E3779B97F4A7C15
    states = np.array([step, (2 * step) % 2**64], np.uint64)
    assert scramble(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_golden_full() -> None:
    order = FullOrder(10, "a1b2", 7)
    assert order.take(0, 0, 10).tolist() == [2, 4, 9, 6, 0, 3, 7, 1, 5, 8]
    assert FullOrder(1000, "a1b2", 7).take(3, 500, 508).tolist() == [564, 729, 178, 151, 388, 627, 797, 190]
    assert FullOrder(10**12, "a1b2", 7).take(0, 0, 3).tolist() == [161633361540, 259148443482, 289587377809]


def test_golden_windowed() -> None:
    order = WindowedOrder(STARTS, "a1b2", 7, window=2)
    assert order.take(0, 0, 14).tolist() == [7, 5, 3, 8, 4, 6, 2, 9, 1, 0, 11, 12, 10, 13]
    assert order.take(1, 0, 14).tolist() == [2, 11, 12, 10, 13, 1, 0, 7, 4, 5, 8, 3, 6, 9]


@given(rows=st.integers(0, 3000), seed=SEEDS, epoch=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_full_is_a_permutation(rows: int, seed: int, epoch: int) -> None:
    taken = FullOrder(rows, "d", seed).take(epoch, 0, rows)
    assert taken.dtype == np.int64
    assert np.array_equal(np.sort(taken), np.arange(rows))


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 127, 128, 129, 65535, 65536, 65537, 200_000])
def test_full_is_a_permutation_beside_powers_of_two_and_over_blocks(rows: int) -> None:
    assert np.array_equal(np.sort(FullOrder(rows, "d", 1).take(0, 0, rows)), np.arange(rows))


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30), window=st.integers(1, 40), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_windowed_permutes_all_rows_and_mixes_only_its_window(lengths: list[int], window: int, seed: int) -> None:
    """Also with empty units; every unit lies wholly in one window of `window` units."""
    starts = np.cumsum([0, *lengths])
    taken = WindowedOrder(starts, "d", seed, window).take(0, 0, int(starts[-1]))
    assert np.array_equal(np.sort(taken), np.arange(starts[-1]))
    units = np.searchsorted(starts, taken, side="right") - 1
    first = {int(unit): int(np.flatnonzero(units == unit)[0]) for unit in set(units)}
    last = {int(unit): int(np.flatnonzero(units == unit)[-1]) for unit in set(units)}
    open_units = [sum(first[u] <= place <= last[u] for u in first) for place in range(len(taken))]
    assert max(open_units, default=0) <= window


def test_windowed_mixes_all_units_of_a_window() -> None:
    """Two caches of 10 units of 10 rows, each with a short unit at its end; 4 units at a time, 2 in the last window."""
    lengths = np.array([10] * 10 + [3] + [10] * 10 + [7])
    starts = np.r_[0, np.cumsum(lengths)]
    order = WindowedOrder(starts, "d", 0, window=4)
    units = np.searchsorted(starts, order.take(2, 0, 210), side="right") - 1
    place, windows = 0, []
    while place < 210:
        members = next(
            np.unique(units[place:end])
            for end in range(place + 1, 211)
            if lengths[np.unique(units[place:end])].sum() == end - place
        )
        switches = np.count_nonzero(np.diff(units[place : place + lengths[members].sum()]))
        assert switches > 2 * len(members)  # unmixed units would be len(members) - 1 switches
        windows.append(members.tolist())
        place += lengths[members].sum()
    assert [len(members) for members in windows] == [4, 4, 4, 4, 4, 2]
    assert windows != sorted(windows)


@given(cuts=st.lists(st.integers(0, 500), max_size=12), windowed=st.booleans())
@settings(max_examples=40, deadline=None)
def test_pieces_make_the_whole(cuts: list[int], windowed: bool) -> None:
    """Asked in any order, by another instance, between questions about other epochs."""
    starts = np.r_[0:500:37, 500]

    def order() -> Order:
        return WindowedOrder(starts, "d", 3, 4) if windowed else FullOrder(500, "d", 3)

    edges = [0, *sorted(cuts), 500]
    asked = order()
    pieces = []
    for start, stop in reversed(list(pairwise(edges))):
        asked.take(6, 0, 1)
        pieces.append(asked.take(5, start, stop))
    assert np.array_equal(np.concatenate(pieces[::-1]), order().take(5, 0, 500))


@pytest.mark.parametrize("name", ["full", "windowed"])
def test_epoch_seed_and_digest_each_change_the_order_independently(name: str) -> None:
    """Rank correlations of 5 unrelated orders of n rows have deviation 1 / sqrt(n)."""
    rows = 4096
    config = OrderConfig(name=name, window=64)  # type: ignore[arg-type]
    starts = np.arange(0, rows + 1, 16)
    orders = [
        make_order(config, starts, digest, seed).take(epoch, 0, rows)
        for digest, seed, epoch in (("d", 0, 0), ("d", 0, 1), ("d", 1, 0), ("e", 0, 0), ("d", 1, 1))
    ]
    correlations = np.corrcoef([np.arange(rows), *orders]) - np.eye(6)
    # A window of a quarter of all units leaves 16 units' worth of freedom to their order.
    assert np.abs(correlations).max() < (5 / np.sqrt(rows) if name == "full" else 0.5)
    equal = [np.mean(a == b) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(equal) < 0.01


def test_first_row_is_uniform_over_seeds() -> None:
    """Chi-square over 7 cells; 22.5 is its 0.999 quantile with 6 degrees of freedom."""
    firsts = [int(FullOrder(7, "d", seed).take(0, 0, 1)[0]) for seed in range(350)]
    assert np.sum((np.bincount(firsts, minlength=7) - 50) ** 2 / 50) < 22.5


def test_neighbours_in_order_are_far_apart() -> None:
    taken = FullOrder(100_000, "d", 0).take(0, 0, 100_000)
    gaps = np.abs(np.diff(taken))
    assert abs(gaps.mean() / 100_000 - 1 / 3) < 0.005  # of two independent uniform numbers


def test_make_order_follows_the_configuration() -> None:
    full = make_order(OrderConfig(), STARTS, "a1b2", 7)
    windowed = make_order(OrderConfig(name="windowed", window=2), STARTS, "a1b2", 7)
    assert full.rows == windowed.rows == 14
    assert np.array_equal(full.take(0, 0, 14), FullOrder(14, "a1b2", 7).take(0, 0, 14))
    assert np.array_equal(windowed.take(0, 0, 14), WindowedOrder(STARTS, "a1b2", 7, 2).take(0, 0, 14))


@pytest.mark.parametrize(("epoch", "start", "stop"), [(-1, 0, 1), (0, -1, 1), (0, 2, 1), (0, 0, 15)])
def test_refuses_places_outside(epoch: int, start: int, stop: int) -> None:
    for name in ("full", "windowed"):
        with pytest.raises(ValueError, match=r"expected"):
            make_order(OrderConfig(name=name), STARTS, "d", 0).take(epoch, start, stop)  # type: ignore[arg-type]


@pytest.mark.parametrize("starts", [[], [1, 2], [0, 5, 3]])
def test_refuses_starts_that_do_not_ascend_from_0(starts: list[int]) -> None:
    for name in ("full", "windowed"):
        with pytest.raises(ValueError, match="unit_starts"):
            make_order(OrderConfig(name=name), starts, "d", 0)  # type: ignore[arg-type]


def test_refuses_a_window_of_nothing() -> None:
    with pytest.raises(ValueError, match="window"):
        WindowedOrder(STARTS, "d", 0, window=0)
