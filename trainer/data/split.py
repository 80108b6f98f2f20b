"""Which samples are held out for validation, decided by the sample's key alone; and draws of some rows out of many."""

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trainer.data.resident import RowNumbers

_PERSON: Final = b"kpu-split"
_BYTES: Final = 8


def validation_mask(keys: Sequence[str] | pa.Array | pa.ChunkedArray, fraction: float) -> npt.NDArray[np.bool_]:
    """True if a sample is held out.

    It depends on the key and on nothing else, so that a sample is on the same side in every cache and every run, and
    a larger fraction only adds samples. Views of a sample share its key.

    Args:
        keys: n keys of samples.
        fraction: The expected share of held-out samples, from 0, below 1.

    Returns:
        bool [n].

    Raises:
        ValueError: `fraction` is not from 0, below 1.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: expected a number from 0, below 1, found {fraction}")
    if isinstance(keys, pa.Array | pa.ChunkedArray):
        keys = keys.to_pylist()
    blake2b = hashlib.blake2b
    digests = b"".join([blake2b(key.encode(), digest_size=_BYTES, person=_PERSON).digest() for key in keys])
    limit = np.uint64(int(fraction * 2 ** (8 * _BYTES)))
    mask: npt.NDArray[np.bool_] = np.frombuffer(digests, "<u8") < limit
    return mask


def some_of(rows: RowNumbers, most: int, seed: int) -> RowNumbers:
    """At most so many of the rows, drawn with a seed, in order."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
