"""Which rows are asked for, and in which units they lie."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

RowSelection = Sequence[int] | npt.NDArray[Any] | slice | int
Numbers = npt.NDArray[np.int64]


def row_numbers(rows: RowSelection, count: int) -> Numbers:
    """Numbers [n] of `rows`: a slice, integers, or a boolean array over all `count` rows.

    Raises:
        IndexError: a row is not one of the `count`.
        TypeError: they are not integers in one dimension.
    """
    if isinstance(rows, slice):
        return np.arange(*rows.indices(count), dtype=np.int64)
    numbers = np.atleast_1d(np.asarray(rows))
    if numbers.dtype == bool and numbers.shape == (count,):
        return np.flatnonzero(numbers)
    if not numbers.size:
        return np.empty(0, np.int64)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise TypeError(f"rows: expected integers in one dimension, found {numbers.dtype}{list(numbers.shape)}")
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= count:
        raise IndexError(f"row {low if low < 0 else high}: the cache has rows 0 to {count - 1}")
    return numbers.astype(np.int64)


def by_unit(numbers: Numbers, unit_rows: int) -> Iterator[tuple[int, Numbers, Numbers]]:
    """Row numbers [n] as (unit, places in `numbers`, rows within the unit), one unit after another."""
    units = numbers // unit_rows
    order = np.argsort(units, kind="stable")
    bounds = np.flatnonzero(np.diff(units[order], prepend=-1))
    for places in np.split(order, bounds[1:]) if len(order) else ():
        unit = int(units[places[0]])
        yield unit, places, numbers[places] - unit * unit_rows
