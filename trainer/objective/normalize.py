"""The training target as an affine map of the standardised output, and the way back; unit variance for learned maps.

Letters: B rows, C channels. x is a teacher's standardised output (y - centre) / std; y is the raw one.
"""

from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kpu.errors import ConfigError
from kpu.format.statistics import ALL_DEAD, Statistics
from trainer.objective.losses import over_workers, weighted_moments

F64 = npt.NDArray[np.float64]
Kind = Literal["standardize", "phi-s", "raw"]

ROWS_PER_CHANNEL: Final = 10  # vectors behind each channel of a covariance that a rotation is taken from

MOMENTUM: Final = 0.1  # share of the latest batch in running statistics
EPSILON: Final = 1e-5  # added to variances, so that a channel that collapses stays visibly below 1


class Normalizer(nn.Module):
    """Standardised targets: the target is x itself. Subclasses map x elsewhere.

    Everything is a buffer, so that a run stores it and reads back exactly what it trained with. Tensors are [..., C].
    """

    std: Tensor
    centre: Tensor

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self.register_buffer("std", _tensor(statistics.std))
        self.register_buffer("centre", _tensor(statistics.centre))

    def forward(self, x: Tensor) -> Tensor:
        """Target of a standardised output."""
        return x

    def standardised(self, target: Tensor) -> Tensor:
        """The standardised output behind a target: the inverse of `forward`."""
        return target

    def raw(self, target: Tensor) -> Tensor:
        """The teacher's own output behind a target, float32."""
        return self.standardised(target).float() * self.std + self.centre


class RawNormalizer(Normalizer):
    """The teacher's own output, y = x * std + centre, float32: a control."""

    def forward(self, x: Tensor) -> Tensor:
        """Target of a standardised output."""
        return x.float() * self.std + self.centre

    def standardised(self, target: Tensor) -> Tensor:
        """The standardised output behind a target."""
        return (target.float() - self.centre) / self.std

    def raw(self, target: Tensor) -> Tensor:
        """The target itself."""
        return target.float()


class PhiNormalizer(Normalizer):
    """PHI standardisation, H U' (y - mean) / sqrt(mean eigenvalue) (PHI-S, Ranzinger et al. 2024, arXiv 2410.01680).

    U holds the eigenvectors of the covariance; H is an orthonormal Hadamard matrix where one of this order is known,
    which gives every channel the variance 1, else a seeded random orthogonal one, which gives 1 on average.
    Float32 whatever autocast says.
    """

    scale: Tensor
    shift: Tensor
    rotation: Tensor

    def __init__(self, statistics: Statistics, seed: int) -> None:
        super().__init__(statistics)
        mean_eigenvalue = float(np.mean(statistics.variance))
        phi = np.sqrt(mean_eigenvalue) or ALL_DEAD
        self.register_buffer("scale", _tensor(statistics.std / phi))
        self.register_buffer("shift", _tensor((statistics.centre - statistics.mean) / phi))
        self.register_buffer("rotation", _tensor(rotation(statistics.covariance, seed)))

    def forward(self, x: Tensor) -> Tensor:
        """Target of a standardised output."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() * self.scale + self.shift) @ self.rotation

    def standardised(self, target: Tensor) -> Tensor:
        """The standardised output behind a target."""
        with torch.autocast(target.device.type, enabled=False):
            return (target.float() @ self.rotation.T - self.shift) / self.scale


def make_normalizer(kind: Kind, statistics: Statistics, seed: int, *, name: str = "this output") -> Normalizer:
    """The normaliser that `targets.normalize` names.

    Args:
        kind: standardize, phi-s or raw.
        statistics: of the training cache's calibration.
        seed: of the random rotation that phi-s uses where no Hadamard matrix is known.
        name: what messages call the output.

    Raises:
        ConfigError: phi-s with fewer than 10 vectors a channel behind the statistics.
    """
    if kind == "standardize":
        return Normalizer(statistics)
    if kind == "raw":
        return RawNormalizer(statistics)
    channels = len(statistics.mean)
    if statistics.count < ROWS_PER_CHANNEL * channels:
        raise ConfigError(
            f"targets.normalize: phi-s expected statistics over at least {ROWS_PER_CHANNEL * channels} vectors "
            f"({ROWS_PER_CHANNEL} for each of {channels} channels) for {name}, found {statistics.count}; extract the "
            f"teacher under a new name with calibration_rows: {ROWS_PER_CHANNEL * channels}, or use standardize"
        )
    return PhiNormalizer(statistics, seed)


def rotation(covariance: F64, seed: int) -> F64:
    """U H', orthogonal [C, C], for row vectors: U the eigenvectors of `covariance`, H as `PhiNormalizer` says."""
    _, vectors = np.linalg.eigh(covariance)
    channels = len(covariance)
    mixing = hadamard(channels)
    return vectors @ (random_orthogonal(channels, seed) if mixing is None else mixing).T


def hadamard(order: int) -> F64 | None:
    """An orthonormal Hadamard matrix, every entry +-1/sqrt(order), or None if none is known here.

    Sylvester's doubling of [[1]], or of Paley's first matrix, of an order q + 1 with a prime q = 3 (mod 4): all powers
    of two, and such widths as 192, 384, 640, 768, 1152, 1280 and 1408.
    """
    core, doublings = order, 0
    while core > 1:
        paley = _paley(core)
        if paley is not None or core % 2:
            break
        core, doublings = core // 2, doublings + 1
    matrix = np.ones((1, 1)) if core == 1 else _paley(core)
    if matrix is None:
        return None
    for _ in range(doublings):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.sqrt(order)
    return matrix


def _paley(order: int) -> F64 | None:
    """Paley's first construction (1933), entries +-1: I + S, S skew and bordered, from the quadratic residues mod q."""
    q = order - 1
    if q % 4 != 3 or any(q % factor == 0 for factor in range(2, int(q**0.5) + 1)):
        return None
    character = np.full(q, -1.0)
    character[np.arange(1, q) ** 2 % q] = 1.0
    character[0] = 0.0
    skew = np.zeros((order, order))
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    places = np.arange(q)
    skew[1:, 1:] = character[(places[:, None] - places[None, :]) % q]
    return np.eye(order) + skew


def random_orthogonal(order: int, seed: int) -> F64:
    """A random orthogonal matrix, uniform over all of them: QR of a Gaussian one with signs fixed (Mezzadri 2007)."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((order, order)))
    return np.asarray(q * np.sign(np.diagonal(r)))


class UnitVariance(nn.Module):
    """Mean 0 and variance 1 per channel over all vectors of a batch, without scale or shift (Ioffe and Szegedy 2015).

    In training, with row weights, by the batch, which also moves the running statistics; otherwise, and always once
    `frozen` is set, by the running statistics as they are.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.frozen = False
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Tensor, weight_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalised x, float32 [B, C] or [B, T, C], and the variance [C] that it was normalised by.

        Args:
            x: [B, C] or [B, T, C].
            weight_B: row weights; a row of weight 0 moves nothing. None: use the running statistics.
        """
        mean, variance = self.mean, self.variance
        if self.training and not self.frozen and weight_B is not None:
            mean, variance = weighted_moments(x, weight_B)
            self._follow(mean.detach(), variance.detach(), weight_B)
        return (x.float() - mean) * (variance + EPSILON).rsqrt(), variance

    def _follow(self, mean: Tensor, variance: Tensor, weight_B: Tensor) -> None:
        """Move the running statistics; the plain mean over batches while they are few."""
        counts = over_workers(weight_B.float().sum()) > 0
        self.batches += counts
        share = counts * (1 / self.batches.clamp(min=1)).clamp(min=MOMENTUM)
        self.mean.lerp_(mean, share)
        self.variance.lerp_(variance, share)


def _tensor(x: F64) -> Tensor:
    return torch.from_numpy(np.array(x, np.float32))
