"""Weights: read from a file, loaded strictly, drawn from a seed, and the digest of what was loaded."""

import hashlib
import math
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kpu.errors import ConfigError, MismatchError
from kpu.torch.checkpoints import explain_misfits, list_misfits, pick_tensors, split_entry
from kpu.util.digests import DIGEST_BYTES, canonical_json, digest

RANDOM = "random"
Weights = str | Mapping[str, Tensor] | None
"""The path of a file, `random`, tensors by name, or None for a model's own."""


def read_weights(path: str | Mapping[str, Tensor], section: str = "student") -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, or from a torch checkpoint that holds nothing but tensors, or as given.

    A checkpoint's `state_dict` or `model` entry is unwrapped, or the one that `path#entry` names, and `module.` removed
    where every name has it. `section` is what messages call the model.

    Raises:
        ConfigError: the file is absent, is neither of the two, needs code to be unpickled, or holds several sets of
            weights, none of them named.
    """
    if not isinstance(path, str):
        return dict(path)
    place, entry = split_entry(path)
    file = Path(place)
    if not file.is_file():
        raise ConfigError(
            f"{section}.weights: expected a .safetensors or .pth file, found none at {place}; give its path"
        )
    loaded: Any
    try:
        loaded = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise ConfigError(
            f"{section}.weights: {place} is no safetensors file or plain torch state_dict ({_found(error)}); save "
            "the model's state_dict() with safetensors or torch.save"
        ) from None
    try:
        return pick_tensors(loaded, entry, lambda value: isinstance(value, Tensor), torch.equal)
    except ValueError as error:
        raise ConfigError(f"{section}.weights: {place} {error}") from None


def _found(error: BaseException) -> str:
    """What is wrong with a file of weights. torch's advice, to run the code in it, is not passed on."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it holds something other than tensors"
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def differences(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What keeps `state` from fitting `module`, one phrase a tensor; empty where it fits."""
    return list_misfits(_shapes(module.state_dict()), _shapes(state))


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: str, section: str = "student") -> None:
    """Copy every tensor of `state`, read from `path`, into `module`.

    Raises:
        MismatchError: naming tensors that are missing, unknown or of another shape, and what `state` holds.
    """
    if differences(module, state):
        found = explain_misfits(_shapes(module.state_dict()), _shapes(state))
        raise MismatchError(f"{section}.weights: {path}: {found}; give weights of this very model")
    module.load_state_dict(dict(state), strict=False)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}


def initialise(build: Callable[[], nn.Module], identity: str, seed: int) -> nn.Module:
    """Build a model with the very weights that an extraction with `weights: random` gives it.

    Every tensor that comes out differently under two seeds is drawn anew, uniform with variance 1 / fan-in, from a
    counter-based generator keyed by `identity`, `seed` and its name; what the model sets to fixed values stays.
    """
    with seeded(0):
        other = build().state_dict()
    with seeded(1):
        module = build()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.equal(tensor, other[name]):
            fan_in = tensor[0].numel() if tensor.ndim > 1 else tensor.numel()
            key = digest(canonical_json([identity, seed, name]))
            tensor.copy_(torch.from_numpy(_uniform(tensor.numel(), key, math.sqrt(3 / fan_in))).view_as(tensor))
    return module


def _uniform(count: int, key: str, bound: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 [count], uniform in -bound..bound. Philox's raw stream is the same in every NumPy version."""
    raw = np.random.Philox(key=int(key, 16)).random_raw((count + 1) // 2).astype("<u8", copy=False)
    words = raw.view("<u4")[:count]
    unit = (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-23) - np.float32(1)
    return unit * np.float32(bound)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random generators of Python, NumPy and torch (CPU), and put their states back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def weights_digest(module: nn.Module) -> str:
    """The digest that an extraction takes of the weights that it loaded, 32 hexadecimal digits.

    Over name, dtype, shape and raw bytes of every tensor, sorted by name.
    """
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, tensor in sorted(module.state_dict().items()):
        state.update(canonical_json([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]))
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()
