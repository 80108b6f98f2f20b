"""Duplicate keys, found in bounded memory: 8 bytes a row, whatever the keys are."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa

from kpu.errors import SourceError
from kpu.sources.tables import place

_BUCKETS: Final = 16
_AT_ONCE: Final = 1000


def unique_keys(listing: Callable[[], Iterator[pa.RecordBatch]]) -> Iterator[pa.RecordBatch]:
    """Yield the batches of `listing()`; at the end, check that no key is in two rows.

    Only a 64-bit hash of each key is kept. If two hashes are equal the source is listed a second time, to compare the
    keys themselves.

    Raises:
        SourceError: after the last batch, naming a key that repeats and both its places.
    """
    hashes: list[np.ndarray[Any, Any]] = []
    for batch in listing():
        hashes.append(_hash(batch.column("key")))
        yield batch
    suspects = _repeated(hashes)
    hashes.clear()
    for start in range(0, len(suspects), _AT_ONCE):
        _compare(listing(), suspects[start : start + _AT_ONCE])


def _hash(keys: pa.Array) -> np.ndarray[Any, Any]:
    # Python's own hash of a string: SipHash, 64 bits, the same throughout one process.
    return np.fromiter(map(hash, keys.to_pylist()), np.int64, len(keys))


def _repeated(hashes: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Values that occur more than once, sorted one bucket at a time so that no second copy of everything is made."""
    found = [np.empty(0, np.int64)]
    for bucket in range(_BUCKETS):
        values = np.concatenate([part[(part & (_BUCKETS - 1)) == bucket] for part in hashes] or found)
        values.sort()
        found.append(np.unique(values[1:][values[1:] == values[:-1]]))
    return np.concatenate(found)


def _compare(batches: Iterator[pa.RecordBatch], suspects: np.ndarray[Any, Any]) -> None:
    places: dict[str, str] = {}
    for batch in batches:
        for row in np.flatnonzero(np.isin(_hash(batch.column("key")), suspects)).tolist():
            key = batch.column("key")[row].as_py()
            here = place(batch, row)
            if key in places:
                raise SourceError(
                    f"duplicate key {key!r}: first in {places[key]}, again in {here}; every image needs a key of its "
                    "own: rename or remove one of them, or name each source once"
                )
            places[key] = here
