"""Moments of batches against those of the whole, in float64."""

import numpy as np
import pytest
import torch

from kpu.format.statistics import Accumulator
from pipeline.worker.moments import moments


@pytest.mark.parametrize("shape", [(50, 6), (50, 9, 6)])
def test_moments_merge_into_those_of_the_whole(shape: tuple[int, ...]) -> None:
    x = (np.random.default_rng(0).normal(size=shape) * 3 + 1000).astype(np.float32)
    x[::7, ..., 2] = 0
    batches, whole = Accumulator(6), Accumulator(6)
    for part in np.split(x, [20, 21]):
        count, mean, comoment, zeros = moments(torch.from_numpy(part))
        assert mean.dtype == comoment.dtype == np.float64
        batches.add(count, mean, comoment, zeros)
    whole.update(x.reshape(-1, 6))
    ours, reference = batches.finish(0.05), whole.finish(0.05)
    assert ours.count == x.size // 6
    assert ours.zeros == reference.zeros == (x == 0).mean()
    np.testing.assert_allclose(ours.mean, x.reshape(-1, 6).astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(ours.covariance, np.cov(x.reshape(-1, 6).T.astype(np.float64), bias=True), rtol=1e-9)
    np.testing.assert_allclose(ours.covariance, reference.covariance, rtol=1e-9)
