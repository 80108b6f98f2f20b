"""What storing cost: stored against unquantised features, in channel standard deviations. The reference, in float64."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kpu.format.commits import Fidelity
from kpu.format.statistics import F64, Statistics


@dataclass
class RowFidelity:
    """Per row: `squared_error` float64[n], the mean over tokens and channels of ((decoded - x) / std)^2; `cosine`
    float64[n], the mean over tokens of the cosine between standardised vectors; `saturated` int64[n], values clipped.
    """

    squared_error: F64
    cosine: F64
    saturated: npt.NDArray[np.int64]


def measure(
    features: npt.NDArray[np.float32],
    decoded: npt.NDArray[np.float32],
    saturated: npt.NDArray[np.bool_],
    statistics: Statistics,
) -> RowFidelity:
    """Compare rows.

    Args:
        features: [n, D] or [n, T, D], as the teacher gave them.
        decoded: of the same shape, as a reader of the cache will get them.
        saturated: of the same shape, the values that were clipped.
        statistics: of the output; vectors are standardised with its centre and std.
    """
    rows = len(features)
    channels = features.shape[-1]
    result = RowFidelity(np.zeros(rows), np.zeros(rows), saturated.reshape(rows, -1).sum(axis=1, dtype=np.int64))
    with np.errstate(invalid="ignore", over="ignore"):  # rows with NaN or infinity give NaN: they are masked later
        for row in range(rows):  # row by row, so that float64 copies stay small
            x, y = (
                (array[row].reshape(-1, channels).astype(np.float64) - statistics.centre) / statistics.std
                for array in (features, decoded)
            )
            result.squared_error[row] = np.mean(np.square(y - x))
            result.cosine[row] = np.mean(_cosine(x, y))
    return result


def _cosine(x: F64, y: F64) -> F64:
    """Cosine of the rows of [T, D]; 1 where both are zero, 0 if one is."""
    norms = np.sqrt(np.einsum("td,td->t", x, x)), np.sqrt(np.einsum("td,td->t", y, y))
    product: F64 = norms[0] * norms[1]
    dots: F64 = np.einsum("td,td->t", x, y)
    both_zero = (norms[0] == 0) & (norms[1] == 0)
    return np.where(both_zero, 1.0, np.divide(dots, product, out=np.zeros_like(dots), where=product != 0))


def summarise(rows: RowFidelity, valid: npt.NDArray[np.bool_], first_row: int) -> Fidelity | None:
    """One record for a unit: `valid` bool[n] marks the rows that count, `first_row` is the number of the first.

    None if no row is valid. Numbers are rounded to six digits, so that the record does not depend on the last bits
    of a sum.
    """
    if not valid.any():
        return None
    errors = np.where(valid, rows.squared_error, -1.0)
    worst = int(np.argmax(errors))
    return Fidelity(
        rmse=_six_digits(math.sqrt(rows.squared_error[valid].mean())),
        cosine=_six_digits(rows.cosine[valid].mean()),
        worst_row=first_row + worst,
        worst_rmse=_six_digits(math.sqrt(errors[worst])),
        saturated=int(rows.saturated[valid].sum()),
    )


def _six_digits(value: Any) -> float:
    return float(f"{value:.6g}")
