"""What every student has in common, and weights: read from a file, loaded strictly, or drawn from a seed.

Letters: B rows, T tokens of a map, D channels.
"""

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cache.digests import canonical_json, digest
from cache.errors import ConfigError, MismatchError
from cache.spec import InputSpec, TeacherSpec
from cache.statistics import Statistics
from trainer.shapes import OutputShape

RANDOM = "random"
_WRAPPERS = ("state_dict", "model")
_PREFIX = "module."
_COUNTER = "num_batches_tracked"  # absent from checkpoints of older torch versions, and without effect on results
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class BaseInfo:
    """The base as its cache describes it; `seed` is its plan's, with which `weights: random` were drawn."""

    spec: TeacherSpec
    shapes: Mapping[str, OutputShape]
    statistics: Mapping[str, Statistics]
    seed: int = 0


class Student(nn.Module):
    """Maps a batch to z', its features in units of the base's standardised outputs.

    `shapes` says what `forward` gives, by output. `input` is how images must be preprocessed, None where the student
    needs none.
    """

    def __init__(self, shapes: Mapping[str, OutputShape], input: InputSpec | None = None) -> None:  # noqa: A002
        super().__init__()
        self.shapes, self.input = dict(shapes), input

    @property
    def needs_images(self) -> bool:
        """Whether `forward` needs images."""
        return self.input is not None

    def forward(self, base: dict[str, Tensor], images: Tensor | None = None) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            base: the base's standardised outputs by name, float32 [B, D] and [B, T, D].
            images: float32 [B, 3, H, W], normalised as `input` says.

        Returns:
            z' by output, [B, D] and [B, T, D].
        """
        raise NotImplementedError


def read_weights(path: str) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, or from a torch checkpoint that holds nothing but tensors.

    A checkpoint's `state_dict` or `model` entry is unwrapped, and `module.` removed where every name has it.

    Raises:
        ConfigError: the file is absent, is neither of the two, or needs code to be unpickled.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"student.weights: expected a .safetensors or .pth file, found none at {path}; give its path")
    loaded: Any
    try:
        loaded = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise ConfigError(
            f"student.weights: {path} is no safetensors file or plain torch state_dict ({reason}); save "
            "the model's state_dict() with safetensors or torch.save"
        ) from None
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ConfigError(f"student.weights: {path}: expected tensors by name, found none; save a state_dict there")
    prefix = _PREFIX if all(name.startswith(_PREFIX) for name in loaded) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in loaded.items()}


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


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """Copy every tensor of `state`, read from `path`, into `module`.

    Raises:
        MismatchError: naming each tensor that is missing, unknown or of another shape.
    """
    found = differences(module, state)
    if found:
        rest = len(found) - _NAMED_AT_MOST
        more = f"; and {rest} more" if rest > 0 else ""
        listed = "; ".join(found[:_NAMED_AT_MOST])
        raise MismatchError(f"student.weights: {path}: {listed}{more}; give weights of this very model")
    module.load_state_dict(dict(state), strict=False)


def initialise(build: Callable[[], nn.Module], identity: str, seed: int) -> nn.Module:
    """Build a model with the very weights that an extraction with `weights: random` gives it.

    Every tensor that comes out differently under two seeds is drawn anew, uniform with variance 1 / fan-in, from a
    counter-based generator keyed by `identity`, `seed` and its name; what the model sets to fixed values stays.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        other = build().state_dict()
        torch.default_generator.manual_seed(1)
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
