"""How much each teacher counts in each row.

Letters: B rows of a batch, N teachers.
"""

import hashlib
import struct
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.order import scramble
from trainer.sections import BalanceConfig

_STEP: Final = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's: 2**64 divided by the golden ratio, odd
_FRACTION_BITS: Final = 53  # of a float64


def uniforms(seed: int, epoch: int, rows: npt.NDArray[np.int64], teacher: str) -> npt.NDArray[np.float64]:
    """Random numbers from 0, below 1, that depend on (seed, epoch, row, teacher) alone.

    The row is the counter of a SplitMix64 generator (Steele, Lea and Flood 2014) whose start is a hash of the rest.

    Args:
        seed: The seed of the run.
        epoch: The epoch, from 0.
        rows: int64 [B].
        teacher: The teacher's name.

    Returns:
        float64 [B].
    """
    message = struct.pack("<QQ", seed, epoch) + teacher.encode()
    start = np.frombuffer(hashlib.blake2b(message, digest_size=8, person=b"kpu-balance").digest(), "<u8")
    words = scramble(start.astype(np.uint64) + rows.astype(np.uint64) * _STEP)
    return (words >> np.uint64(64 - _FRACTION_BITS)).astype(np.float64) * 2.0**-_FRACTION_BITS


def coefficients(config: BalanceConfig, losses_BN: Tensor, valid_BN: Tensor, randoms_BN: Tensor | None) -> Tensor:
    """1 where a teacher counts in a row, 0 if it does not; to be divided by their sum over teachers in each row.

    `dropping` (UNIC, Sariyildiz et al. 2024, "teacher dropping"): in each row the valid teacher with the largest loss
    counts, the first of equals; each other valid one counts where its random number is at least `config.p`.

    Args:
        config: The section `balance`.
        losses_BN: float [B, N], detached; anything where `valid_BN` is false.
        valid_BN: bool [B, N].
        randoms_BN: float [B, N], from 0, below 1 (see `uniforms`); None for `uniform`.

    Returns:
        float32 [B, N]; rows without any valid teacher are zeros.
    """
    if config.name == "uniform":
        return valid_BN.float()
    assert randoms_BN is not None
    largest_B1 = losses_BN.masked_fill(~valid_BN, -torch.inf).argmax(dim=1, keepdim=True)
    counts_BN = (randoms_BN >= config.p).scatter(1, largest_B1, True)
    return (counts_BN & valid_BN).float()
