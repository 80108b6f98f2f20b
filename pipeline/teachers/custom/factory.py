"""Anyone's own teachers: `torch:<module or path/to/file.py>:<factory>`.

The factory returns an `nn.Module` that maps normalised images [B, 3, H, W] to a dict of named tensors: `global` [B, D],
`patch` [B, D, H, W] or [B, T, D] of a grid with the image's proportions, and any further maps, which `layers` asks for
by name. It takes no argument, or an optional `state_dict`: the tensors by name that will be loaded into what it
returns, or None, so that it can build a head of their size. The module may have the attributes `head` (an `nn.Linear`
on `global`) and `data_config` (a dict with timm's keys input_size, mean, std, interpolation and crop_pct). It may be a
TorchScript module, a `torch.export` program or the module of one. What computes with other files, as an ONNX session,
names them in an attribute `program_files`, a list of paths, relative ones beginning at the Python file: their content
is part of what the cache remembers.

A file may import its neighbours, at its top or while the factory runs. It is sent to workers; its neighbours are not.
"""

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from kpu.errors import TeacherError, TrustError
from kpu.torch.weights import RANDOM, build_twice, initialise, seeded
from kpu.trust.code import Code, CodeLoader, read_code, split_model
from kpu.trust.list import Trust
from kpu.util.digests import digest
from pipeline.sections import TeacherConfig
from pipeline.teachers.backbone import Backbone, describe, input_spec, reason
from pipeline.teachers.custom.identity import hidden_digests, identify
from pipeline.teachers.custom.programs import as_module, freeze, linear_of, programs
from pipeline.teachers.weights import load_strictly, read_weights

_NAMED_AT_MOST = 5


def read_source(model: str) -> Code:
    """The code that defines a `torch:` model, read but not run.

    Raises:
        TeacherError: there is no such file.
    """
    place, _ = split_model(model)
    try:
        code = read_code(model)
    except OSError as error:
        raise TeacherError(f"{model}: expected a Python file at {place}: {error.strerror}") from None
    assert code is not None
    return code


def load_custom(name: str, config: TeacherConfig, source: bytes | None, trust: Trust, seed: int) -> Backbone:
    """Call the factory and load the weights into what it returns. `source` is the file's content, None of a module.

    Raises:
        TeacherError: the file or module does not import, has no such factory, the factory fails or returns something
            else, the weights do not fit, or none are given and the factory loads none.
        TrustError: `trust` does not let it run.
    """
    who = describe(name, config)
    if config.pool != "auto":
        raise TeacherError(
            f"{who}: pool: expected auto for a module of your own, which pools itself, found {config.pool}"
        )
    place, factory_name = split_model(config.model)
    code = read_source(config.model) if source is None else Code(place, factory_name, Path(place), source)
    loader = CodeLoader(trust)
    loader.require(code, who)
    path = config.weights if config.weights not in (None, RANDOM) else None
    state = read_weights(path, who) if path is not None else None
    with _imported(code, loader, who) as python_module:
        factory = _find_factory(python_module, factory_name, who)
        build = partial(_build, factory, state, who)
        if config.weights == RANDOM:
            module = initialise(build, f"torch:{factory_name}", seed)
        elif config.weights is None:
            module = _with_own_weights(build, who)
        else:
            with seeded(seed):
                module = build()
            _check_hidden(build, module, who)
        if state is not None and path is not None:
            load_strictly(module, state, who, path)
        module = freeze(module)
        folder = Path(place).parent if place.endswith(".py") else Path()
        extra = identify(module, factory, python_module, folder, who)
    own = getattr(module, "data_config", {})
    if not isinstance(own, Mapping):
        raise TeacherError(f"{who}: data_config: expected a dict with timm's keys, found {type(own).__name__}")
    return Backbone(
        module=module,
        features=module,
        wanted={output: (output,) for output in config.outputs} | _layers(config, who),
        input=input_spec(own, config.input, who),
        head=_head(module, who),
        source_digest=_source_digest(python_module, source),
        extra_digest=extra,
        compiled=next(programs(module), None) is not None,
        code=loader.ran,
    )


def _layers(config: TeacherConfig, who: str) -> dict[str, tuple[str, ...]]:
    """Each layer's output `<layer>.patch`, which the model may emit under that name or under the layer's own."""
    found: dict[str, tuple[str, ...]] = {}
    for layer in config.layers:
        key = f"layer{layer}" if isinstance(layer, int) else layer.removesuffix(".patch")
        if f"{key}.patch" in found:
            raise TeacherError(f"{who}: layers: expected each once, found {list(config.layers)}")
        found[f"{key}.patch"] = (key, f"{key}.patch")
    return found


def _head(module: nn.Module, who: str) -> nn.Linear | None:
    head = getattr(module, "head", None)
    if isinstance(head, nn.Identity):
        return None
    if head is not None and next(programs(module), None) is not None:
        head = linear_of(head) or head
    if head is not None and not isinstance(head, nn.Linear):
        raise TeacherError(f"{who}: head: expected an nn.Linear on `global`, found {type(head).__name__}")
    return head


def _find_factory(python_module: ModuleType, factory_name: str, who: str) -> Callable[..., Any]:
    factory: Callable[..., Any] | None = getattr(python_module, factory_name, None)
    if factory is None or not callable(factory):
        names = [each for each, value in vars(python_module).items() if callable(value) and not each.startswith("_")]
        near = difflib.get_close_matches(factory_name, names, n=3)
        advice = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(names[-5:]) or 'none'}"
        raise TeacherError(f"{who}: has no factory {factory_name!r}; {advice}")
    return factory


def _build(factory: Callable[..., Any], state: Mapping[str, Tensor] | None, who: str) -> nn.Module:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise TeacherError(f"{who}: expected a factory, found {factory!r} ({error})") from None
    arguments: dict[str, Any] = {"state_dict": state} if "state_dict" in parameters else {}
    required = [
        each.name
        for each in parameters.values()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if "weights" in required:
        arguments["weights"] = None
    if set(required) - arguments.keys():
        raise TeacherError(
            f"{who}: expected a factory that needs no argument, found {', '.join(required)}; give them defaults"
        )
    try:
        module = as_module(factory(**arguments))
    except TrustError:
        raise
    except (Exception, SystemExit) as error:
        raise TeacherError(f"{who}: the factory raised {reason(error)}") from error
    if not isinstance(module, nn.Module):
        raise TeacherError(f"{who}: expected the factory to return an nn.Module, found {type(module).__name__}")
    return module


def _with_own_weights(build: Callable[[], nn.Module], who: str) -> nn.Module:
    """What a factory gives that loads trained weights by itself: the same, whatever the seed."""
    hidden: list[dict[str, str]] = []

    def recorded() -> nn.Module:
        module = build()
        hidden.append(hidden_digests(module))
        return module

    module, drawn = build_twice(recorded)
    drawn += [name for name, found in hidden[1].items() if hidden[0].get(name) != found]
    if drawn:
        more = f" and {len(drawn) - _NAMED_AT_MOST} more" if len(drawn) > _NAMED_AT_MOST else ""
        raise TeacherError(
            f"{who}: weights: expected a file of weights, or a factory that loads its own, found null and random "
            f"values in {', '.join(drawn[:_NAMED_AT_MOST])}{more}; give weights: <file.safetensors or .pth>, or "
            "weights: random where random ones are wanted"
        )
    return module


def _check_hidden(build: Callable[[], nn.Module], module: nn.Module, who: str) -> None:
    """Refuse random values that no file of weights replaces, for they are in no state_dict."""
    if found := hidden_digests(module):
        with seeded(2**32 - 1):
            again = hidden_digests(build())
        drawn = [name for name, each in found.items() if again.get(name) != each]
        if drawn:
            raise TeacherError(
                f"{who}: weights: expected all random values to be replaced by those of the file, found "
                f"{', '.join(drawn[:_NAMED_AT_MOST])} outside the state_dict; make them parameters or "
                "persistent buffers"
            )


@contextmanager
def _imported(code: Code, loader: CodeLoader, who: str) -> Iterator[ModuleType]:
    """The module that the code makes, which may import its neighbours meanwhile."""
    with ExitStack() as stack:
        try:
            module = stack.enter_context(loader.imported(code, who))
        except TrustError:
            raise
        except (Exception, SystemExit) as error:
            raise TeacherError(f"{who}: {_not_imported(code, error)}") from error
        yield module


def _not_imported(code: Code, error: BaseException) -> str:
    if code.is_file:
        hint = "" if Path(code.place).is_file() else "; the file alone was sent here: install here what it imports"
        return f"{code.place} does not import: {reason(error)}{hint}"
    file = code.place.replace(".", "/") + ".py"
    advice = f"; to import the file, write torch:{file}:<factory>" if Path(file).is_file() else ""
    return f"module {code.place} does not import: {reason(error)}{advice}"


def _source_digest(python_module: ModuleType, source: bytes | None) -> str | None:
    """Digest of the file that defines the model."""
    if source is None:
        file = getattr(python_module, "__file__", None)
        if file is None or not file.endswith(".py"):
            return None
        source = Path(file).read_bytes()
    return digest(source)
