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

from cache.digests import DIGEST_BYTES, canonical_json, digest
from cache.errors import ConfigError, MismatchError

RANDOM = "random"
Weights = str | Mapping[str, Tensor] | None
"""The path of a file, `random`, tensors by name, or None for a model's own."""

_WRAPPERS = ("state_dict", "model")
_PREFIX = "module."
_COUNTER = "num_batches_tracked"  # absent from checkpoints of older torch versions, and without effect on results
_NAMED_AT_MOST = 5


def read_weights(path: str | Mapping[str, Tensor], section: str = "student") -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, or from a torch checkpoint that holds nothing but tensors, or as given.

    A checkpoint's `state_dict` or `model` entry is unwrapped, and `module.` removed where every name has it. `section`
    is what messages call the model.

    Raises:
        ConfigError: the file is absent, is neither of the two, or needs code to be unpickled.
    """
    if not isinstance(path, str):
        return dict(path)
    file = Path(path)
    if not file.is_file():
        raise ConfigError(
            f"{section}.weights: expected a .safetensors or .pth file, found none at {path}; give its path"
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
            f"{section}.weights: {path} is no safetensors file or plain torch state_dict ({_found(error)}); save "
            "the model's state_dict() with safetensors or torch.save"
        ) from None
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ConfigError(f"{section}.weights: {path}: expected tensors by name, found none; save a state_dict there")
    prefix = _PREFIX if all(name.startswith(_PREFIX) for name in loaded) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in loaded.items()}


def _found(error: BaseException) -> str:
    """What is wrong with a file of weights. torch's advice, to run the code in it, is not passed on."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it holds something other than tensors"
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def differences(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What keeps `state` from fitting `module`, one phrase a tensor; empty where it fits."""
    expected = module.state_dict()
    found = []
    for name, tensor in expected.items():
        if name not in state:
            if not name.endswith(_COUNTER):
                found.append(f"{name}: expected shape {list(tensor.shape)}, found no such tensor")
        elif state[name].shape != tensor.shape:
            found.append(f"{name}: expected shape {list(tensor.shape)}, found {list(state[name].shape)}")
    found += [f"{name}: expected no such tensor, found {list(state[name].shape)}" for name in state.keys() - expected]
    return found


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: str, section: str = "student") -> None:
    """Copy every tensor of `state`, read from `path`, into `module`.

    Raises:
        MismatchError: naming each tensor that is missing, unknown or of another shape.
    """
    found = differences(module, state)
    if found:
        rest = len(found) - _NAMED_AT_MOST
        more = f"; and {rest} more" if rest > 0 else ""
        listed = "; ".join(found[:_NAMED_AT_MOST])
        raise MismatchError(f"{section}.weights: {path}: {listed}{more}; give weights of this very model")
    module.load_state_dict(dict(state), strict=False)


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
