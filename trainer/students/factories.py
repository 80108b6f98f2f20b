"""Models of anyone's own factory: `torch:<file.py or module>:<factory>`."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from kpu.errors import ConfigError, MismatchError, TrustError
from kpu.torch.weights import RANDOM, initialise, seeded
from kpu.trust.code import Code, CodeLoader
from trainer.students.weights import Weights, load_strictly, read_weights


def code_of(model: str, codes: CodeLoader, section: str) -> Code | None:
    """The code that defines a `torch:` model, read but not run; None of any other. `section` is what messages call it.

    Raises:
        ConfigError: there is no such file.
    """
    try:
        return codes.read(model)
    except OSError as error:
        place = model.removeprefix("torch:").rpartition(":")[0]
        raise ConfigError(
            f"{section}.model: expected a factory at {model}, found no file {place} ({error.strerror}); restore it"
        ) from None


def from_factory(
    model: str, weights: Weights, seed: int | None, section: str, codes: CodeLoader, recorded: str | None = None
) -> nn.Module:
    """Call a factory and load weights into what it returns.

    Args:
        model: `torch:<file.py or module>:<factory>`.
        weights: a file, tensors by name, `random`, or None for what the factory gives.
        seed: with it what the factory draws, and `random` weights, are those of an extraction.
        section: what messages call the model.
        codes: what reads the code, and says whether it may run.
        recorded: the digest of the code that is wanted, where it is known.

    Raises:
        ConfigError: the factory is absent, fails, or gives no module.
        MismatchError: the weights do not fit it, or the code is another than was recorded.
        TrustError: its code may not run.
    """
    code = code_of(model, codes, section)
    assert code is not None
    recorded = codes.recorded.get(model, recorded)
    if recorded is not None and code.digest is not None and code.digest != recorded:
        raise MismatchError(
            f"{section}.model: {model}: expected the code that was used before (digest {recorded}), found another "
            f"({code.digest}); restore it"
        )
    codes.require(code, f"{section}.model: {model}")
    state = read_weights(weights, section) if weights is not None and weights != RANDOM else None
    try:
        with codes.imported(code, f"{section}.model: {model}") as python_module:
            factory: Callable[..., nn.Module] = getattr(python_module, code.factory)
            takes = "state_dict" in inspect.signature(factory).parameters
            build = partial(factory, state_dict=state) if takes else factory
            if weights == RANDOM and seed is not None:
                module = initialise(build, f"torch:{code.factory}", seed)
            else:
                with seeded(seed) if seed is not None else nullcontext():
                    module = build()
    except TrustError:
        raise
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"[:400]
        raise ConfigError(f"{section}.model: expected a factory at {model} that gives a module ({reason})") from error
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
    """A module's own preprocessing in timm's keys; empty if it has none."""
    return dict(getattr(module, "data_config", {}))
