"""Weights of a torch model: read from a file, loaded strictly, drawn from a seed, and the digest of what was loaded.

Extraction and training share this, so that `random` weights and digests mean the same in both.
"""

import hashlib
import math
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kpu.torch.checkpoints import NAMED_AT_MOST, explain_misfits, list_misfits, pick_tensors, split_entry
from kpu.util.digests import DIGEST_BYTES, canonical_json, digest

RANDOM: Final = "random"


class WeightsError(ValueError):
    """Weights cannot be read, or do not fit. The message is a clause, to be put behind the name of the setting."""


def read_weights(path: str) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, or from a torch checkpoint that holds nothing but tensors.

    A checkpoint's `state_dict` or `model` entry is unwrapped, or the one that `path#entry` names, and `module.` removed
    if every name has it.

    Raises:
        WeightsError: the file is absent, is neither of the two, needs code to be unpickled, or holds several sets of
            weights, none of them named.
    """
    place, entry = split_entry(path)
    file = Path(place)
    if not file.is_file():
        raise WeightsError(f"expected a .safetensors or .pth file, found none at {place}; give its path")
    loaded: Any
    try:
        if file.suffix == ".safetensors":
            loaded = load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise WeightsError(
            f"{place} is no safetensors file or plain torch state_dict ({_found(file, error)}); save the model's "
            "state_dict() with safetensors or torch.save"
        ) from None
    try:
        return pick_tensors(loaded, entry, lambda value: isinstance(value, Tensor), torch.equal)
    except ValueError as error:
        raise WeightsError(f"{place} {error}") from None


def _found(file: Path, error: BaseException) -> str:
    """What is wrong with a file of weights. torch's advice, to run the code in it, is not passed on."""
    if not isinstance(error, pickle.UnpicklingError) and "weights_only" not in str(error):
        return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    objects: list[str] = []
    with suppress(Exception):  # it reads checkpoints in the newer of torch's two formats
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    names = ", ".join(objects[:NAMED_AT_MOST])
    return f"it holds {names} besides tensors" if names else "it holds something other than tensors"


def differences(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What keeps `state` from fitting `module`, one phrase a tensor; empty if it fits."""
    return list_misfits(_shapes(module.state_dict()), _shapes(state))


def load_strictly(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy every tensor of `state` into `module`.

    Raises:
        WeightsError: naming tensors that are missing, unknown or of another shape, and what `state` holds.
    """
    if differences(module, state):
        raise WeightsError(explain_misfits(_shapes(module.state_dict()), _shapes(state)))
    module.load_state_dict(dict(state), strict=False)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}


def weights_digest(module: nn.Module) -> str:
    """Digest over name, dtype, shape and raw bytes of every tensor, sorted by name; 32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, tensor in sorted(module.state_dict().items()):
        state.update(canonical_json([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]))
        state.update(_raw(tensor))
    return state.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random generators of Python, NumPy and torch (CPU), and restore their states afterwards."""
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


def build_twice(build: Callable[[], nn.Module]) -> tuple[nn.Module, list[str]]:
    """Build a model under two seeds; return the second, and the names of its tensors that differ from the first.

    Only digests of the first are kept, so that there is room for a large one.
    """
    with seeded(0):
        first = {name: digest(_raw(tensor)) for name, tensor in build().state_dict().items()}
    with seeded(1):
        module = build()
    return module, [name for name, tensor in module.state_dict().items() if digest(_raw(tensor)) != first.get(name)]


def initialise(build: Callable[[], nn.Module], identity: str, seed: int) -> nn.Module:
    """Build a model whose random parameters depend on `identity` and `seed` alone, bit for bit on every machine.

    torch's own draws differ with the CPU's vector instructions. So every tensor that `build_twice` finds to be random
    is drawn again, uniform with variance 1 / fan-in, from a counter-based generator. What the model sets to fixed
    values stays.
    """
    if torch.get_default_device().type == "meta":  # there are no values to draw
        return build()
    module, drawn = build_twice(build)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and name in drawn:
            fan_in = tensor[0].numel() if tensor.ndim > 1 else tensor.numel()
            key = digest(canonical_json([identity, seed, name]))
            tensor.copy_(torch.from_numpy(_uniform(tensor.numel(), key, math.sqrt(3 / fan_in))).view_as(tensor))
    return module


def _uniform(count: int, key: str, bound: float) -> npt.NDArray[np.float32]:
    """float32 [count], uniform in -bound..bound. Philox's raw stream is the same in every NumPy version."""
    raw = np.random.Philox(key=int(key, 16)).random_raw((count + 1) // 2).astype("<u8", copy=False)
    words = raw.view("<u4")[:count]
    unit = (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-23) - np.float32(1)
    return unit * np.float32(bound)
