"""Moments of features, on the device. Letters: B rows, T tokens, D channels."""

import numpy as np
import torch
from torch import Tensor


def moments(features: Tensor) -> tuple[int, np.ndarray, np.ndarray, int]:
    """Count, mean [D] and sum of outer products of deviations [D, D] over the vectors of [B, D] or [B, T, D], and how
    many values are 0.

    Computed in float64 where the features are; as `kpu.format.statistics.Accumulator.add` takes them.
    """
    with torch.inference_mode():
        x_ND = features.reshape(-1, features.shape[-1]).double()
        mean_D = x_ND.mean(0)
        x_ND = x_ND - mean_D
        comoment_DD = x_ND.T @ x_ND
        zeros = features.numel() - int(torch.count_nonzero(features))
        return len(x_ND), mean_D.cpu().numpy(), comoment_DD.cpu().numpy(), zeros
