"""Which samples are held out."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from trainer.data.split import validation_mask

KEYS = [f"img/{i}.jpg" for i in range(5000)]


def test_golden() -> None:
    assert np.flatnonzero(validation_mask(KEYS[:40], 0.25)).tolist() == [0, 14, 16, 20, 22, 24, 25, 26, 28, 31, 34]


def test_is_the_hash_of_the_key_below_the_fraction() -> None:
    digest = hashlib.blake2b("schlüssel".encode(), digest_size=8, person=b"kpu-split").digest()
    share = int.from_bytes(digest, "little") / 2**64
    assert validation_mask(["schlüssel"], share + 1e-9).tolist() == [True]
    assert validation_mask(["schlüssel"], share - 1e-9).tolist() == [False]


def test_depends_on_nothing_but_the_key() -> None:
    mask = validation_mask(KEYS, 0.1)
    shuffled = np.random.default_rng(0).permutation(len(KEYS))[:777]
    assert np.array_equal(validation_mask([KEYS[i] for i in shuffled], 0.1), mask[shuffled])


def test_share_and_nesting() -> None:
    small, large = validation_mask(KEYS, 0.02), validation_mask(KEYS, 0.3)
    assert abs(small.mean() - 0.02) < 5 * np.sqrt(0.02 * 0.98 / len(KEYS))
    assert abs(large.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / len(KEYS))
    assert not (small & ~large).any()


def test_arrow_columns_are_keys_too() -> None:
    mask = validation_mask(KEYS, 0.1)
    assert np.array_equal(validation_mask(pa.array(KEYS), 0.1), mask)
    assert np.array_equal(validation_mask(pa.chunked_array([KEYS[:7], KEYS[7:]]), 0.1), mask)


def test_none_and_nothing() -> None:
    assert not validation_mask(KEYS, 0.0).any()
    assert validation_mask([], 0.5).shape == (0,)
    assert validation_mask([], 0.5).dtype == np.bool_


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_refuses_a_fraction_outside(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        validation_mask(KEYS, fraction)
