"""Models of anyone's own factory: `torch:<file.py or module>:<factory>`."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from cache.digests import digest
from cache.errors import ConfigError
from trainer.students.weights import RANDOM, Weights, initialise, load_strictly, read_weights, seeded


def split_place(model: str) -> tuple[str, str]:
    """The file or module, and the factory, of `torch:<file.py or module>:<factory>`."""
    place, _, factory = model.removeprefix("torch:").rpartition(":")
    return place, factory


def source_of(model: str) -> bytes | None:
    """The file that defines a `torch:` model; None where it is a module, or no `torch:` model.

    Raises:
        ConfigError: there is no such file.
    """
    place, _ = split_place(model)
    if not model.startswith("torch:") or not place.endswith(".py"):
        return None
    try:
        return Path(place).read_bytes()
    except OSError as error:
        raise ConfigError(f"{model}: expected a Python file at {place} ({error.strerror}); restore it") from None


def from_factory(model: str, weights: Weights, seed: int | None, section: str) -> nn.Module:
    """Call a factory and load weights into what it returns.

    Args:
        model: `torch:<file.py or module>:<factory>`.
        weights: a file, tensors by name, `random`, or None for what the factory gives.
        seed: with it what the factory draws, and `random` weights, are those of an extraction.
        section: what messages call the model.

    Raises:
        ConfigError: the factory is absent, fails, or gives no module.
        MismatchError: the weights do not fit it.
    """
    path, name = split_place(model)
    state = read_weights(weights, section) if weights is not None and weights != RANDOM else None
    folder = str(Path(path).absolute().parent)
    sys.path.append(folder)  # a file may import its neighbours, also while the factory runs
    try:
        factory: Callable[..., nn.Module] = getattr(_import(path), name)
        takes = "state_dict" in inspect.signature(factory).parameters
        build = partial(factory, state_dict=state) if takes else factory
        if weights == RANDOM and seed is not None:
            module = initialise(build, f"torch:{name}", seed)
        else:
            with seeded(seed) if seed is not None else nullcontext():
                module = build()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:400]
        raise ConfigError(f"{section}.model: expected a factory at {model} that gives a module ({reason})") from error
    finally:
        sys.path.remove(folder)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{section}.model: {model}: expected an nn.Module, found {type(module).__name__}")
    _refuse_programs(module, model, section)
    if state is not None:
        load_strictly(module, state, weights if isinstance(weights, str) else model, section)
    return module


def _refuse_programs(module: nn.Module, model: str, section: str) -> None:
    """A compiled program, or a module that computes with files, can neither be trained nor travel in an export."""
    kinds = {
        "a torch.export program": any("train" in vars(part) for part in module.modules()),
        "a TorchScript program": section == "base"
        and any(isinstance(p, torch.jit.ScriptModule) for p in module.modules()),
        "a module that computes with files": bool(getattr(module, "program_files", ())),
    }
    for kind, found in kinds.items():
        if found:
            raise ConfigError(
                f"{section}.model: {model}: expected a module of Python code and tensors, found {kind}; students of "
                "kind side and frozen learn from its cached features, but cannot be exported"
            )


def data_config(module: nn.Module) -> dict[str, Any]:
    """A module's own preprocessing in timm's keys; empty where it has none."""
    return dict(getattr(module, "data_config", {}))


def _import(path: str) -> ModuleType:
    if not path.endswith(".py"):
        return importlib.import_module(path)
    name = f"kpu_student_{digest(path.encode(), Path(path).read_bytes())}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, for one, look there
    spec.loader.exec_module(module)
    return module
