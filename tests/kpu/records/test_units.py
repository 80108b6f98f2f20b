import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kpu.records.units import count_rows, mask_digest, pack_mask, units_left, unpack_mask
from tests.support.builders import SmallCache


@given(arrays(bool, st.integers(1, 200)))
def test_masks_come_back(mask: np.ndarray) -> None:
    assert np.array_equal(unpack_mask(pack_mask(mask), len(mask)), mask)


def test_the_first_row_is_the_highest_bit_and_trailing_zeros_are_left_out() -> None:
    assert pack_mask(np.array([1, 0, 0, 0, 0, 0, 0, 0, 0], bool)) == "8"
    assert pack_mask(np.array([0, 0, 0, 0, 0, 1, 0, 0, 1], bool)) == "048"
    assert pack_mask(np.zeros(4096, bool)) == ""


@pytest.mark.parametrize("digits", ["001", "zz", "-1"])
def test_masks_of_other_rows_are_refused(digits: str) -> None:
    with pytest.raises(ValueError, match=r"beyond 8|hexadecimal"):
        unpack_mask(digits, 8)


def test_masks_of_other_rows_have_other_digests() -> None:
    masks = [np.zeros(8, bool), np.ones(8, bool), np.zeros(16, bool), np.eye(1, 8, 3, dtype=bool)[0]]
    assert len({mask_digest(mask) for mask in masks}) == 4


def test_units_that_are_left_and_their_rows(small_cache: SmallCache) -> None:
    """Of 8, 8 and 4 rows."""
    for teacher, unit in [("alpha", 0), ("alpha", 2), ("beta", 1)]:
        (small_cache.path / f"teachers/{teacher}/commits/{unit:06d}.json").unlink()
    left = units_left(small_cache.storage, small_cache.plan, ["alpha", "beta", "gamma"])
    assert {name: units.tolist() for name, units in left.items()} == {
        "alpha": [True, False, True],
        "beta": [False, True, False],
        "gamma": [True, True, True],
    }
    rows = {name: count_rows(small_cache.plan, units) for name, units in left.items()}
    assert rows == {"alpha": 12, "beta": 8, "gamma": 20}
