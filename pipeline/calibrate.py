"""Which rows the calibration looks at, and the moments of what it sees. Letters: B rows, T tokens, D channels."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cache.spec import Plan, TeacherSpec

ROWS_PER_CHANNEL = 10
LEAST_ROWS = 2048
_STREAM = 0x6B70752D63616C69  # apart from other uses of the plan's seed


def choose_rows(plan: Plan, widest: int, calibration_rows: int | Literal["auto"]) -> np.ndarray:
    """Sorted, distinct row numbers, int64: one drawn from each of as many equal stretches of the plan.

    `auto` is 10 rows for each of `widest` channels, at least 2,048. There are never more than the plan has.
    """
    wanted = max(LEAST_ROWS, ROWS_PER_CHANNEL * widest) if calibration_rows == "auto" else calibration_rows
    count = min(wanted, plan.rows)
    edges = np.arange(count + 1, dtype=np.int64) * plan.rows // count
    draws = np.random.Philox(key=[plan.seed, _STREAM]).random_raw(count)  # this stream is fixed by NumPy's contract
    chosen: np.ndarray = edges[:-1] + (draws % np.diff(edges).astype(np.uint64)).astype(np.int64)
    return chosen


def thin_calibration(spec: TeacherSpec, rows: int) -> str | None:
    """A warning where `rows` are too few for the covariance of this teacher's `global`; None where they suffice."""
    channels = max((output.channels for output in spec.outputs if output.grid is None), default=0)
    if rows >= ROWS_PER_CHANNEL * channels:
        return None
    return (
        f"teacher {spec.name!r}: calibrated on {rows} rows, fewer than {ROWS_PER_CHANNEL} for each of the {channels} "
        "channels of its global output: the statistics are rough; use more images, or set calibration_rows"
    )


def moments(features: Tensor) -> tuple[int, np.ndarray, np.ndarray]:
    """Count, mean [D] and sum of outer products of deviations [D, D] over the vectors of [B, D] or [B, T, D].

    Computed in float64 where the features are; as `cache.statistics.Accumulator.add` takes them.
    """
    with torch.inference_mode():
        x_ND = features.reshape(-1, features.shape[-1]).double()
        mean_D = x_ND.mean(0)
        x_ND = x_ND - mean_D
        comoment_DD = x_ND.T @ x_ND
        return len(x_ND), mean_D.cpu().numpy(), comoment_DD.cpu().numpy()
