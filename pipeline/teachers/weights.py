"""Weights of a teacher, with errors that name it."""

import socket
import urllib.request
from collections.abc import Mapping
from urllib.parse import urlsplit

from torch import Tensor, nn

from kpu.errors import TeacherError
from kpu.torch import weights


def read_weights(path: str, who: str) -> dict[str, Tensor]:
    """As `kpu.torch.weights.read_weights`; `who` names the teacher in messages.

    Raises:
        TeacherError: the file holds no usable weights.
    """
    try:
        return weights.read_weights(path)
    except weights.WeightsError as error:
        raise TeacherError(f"{who}: weights: {error}") from None


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], who: str, path: str) -> None:
    """Copy every tensor of `state`, read from `path`, into `module`.

    Raises:
        TeacherError: naming tensors that are missing, unknown or of another shape, and what `state` holds.
    """
    try:
        weights.load_strictly(module, state)
    except weights.WeightsError as error:
        raise TeacherError(f"{who}: weights: {path} does not fit: {error}") from None


def can_reach(url: str) -> bool:
    """Whether the host of `url` has an address, so that an offline machine is told at once and not after retries."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(url).hostname, None)
    except OSError:
        return False
    return True
