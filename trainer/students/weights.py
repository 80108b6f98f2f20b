"""Weights of a student or its base, with errors that name the setting."""

from collections.abc import Mapping

from torch import Tensor, nn

from kpu.errors import ConfigError, MismatchError
from kpu.torch import weights

Weights = str | Mapping[str, Tensor] | None
"""The path of a file, `random`, tensors by name, or None for a model's own."""


def read_weights(path: str | Mapping[str, Tensor], section: str = "student") -> dict[str, Tensor]:
    """As `kpu.torch.weights.read_weights`, or the tensors as given; `section` is what messages call the model.

    Raises:
        ConfigError: the file holds no usable weights.
    """
    if not isinstance(path, str):
        return dict(path)
    try:
        return weights.read_weights(path)
    except weights.WeightsError as error:
        raise ConfigError(f"{section}.weights: {error}") from None


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: str, section: str = "student") -> None:
    """Copy every tensor of `state`, read from `path`, into `module`.

    Raises:
        MismatchError: naming tensors that are missing, unknown or of another shape, and what `state` holds.
    """
    try:
        weights.load_strictly(module, state)
    except weights.WeightsError as error:
        raise MismatchError(f"{section}.weights: {path}: {error}; give weights of this very model") from None
