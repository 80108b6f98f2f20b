"""What hangs on a module where torch does not look: tensors and programs in attributes, closures and globals."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import numpy as np
from torch import Tensor, nn
from torch.export import ExportedProgram

from pipeline.teachers.custom.programs import is_exported, is_script

Holding = Tensor | np.ndarray | nn.Module | ExportedProgram

_OF_MODULES: Final = frozenset(vars(nn.Module()))  # fields that torch looks after
_PLAIN: Final = (str, bytes, int, float, complex, type, ModuleType, Path, Enum, type(None))
_RUNTIMES: Final = frozenset(
    [
        "coremltools",
        "jax",
        "jaxlib",
        "ncnn",
        "onnx",
        "onnxruntime",
        "openvino",
        "paddle",
        "tensorflow",
        "tensorrt",
        "tflite_runtime",
    ]
)
_DEEPEST: Final = 8


@dataclass(frozen=True)
class Found:
    """`held` are tensors, modules and programs by where they hang; `opaque` names objects of other runtimes."""

    held: tuple[tuple[str, Holding], ...]
    opaque: tuple[str, ...]


def search(module: nn.Module, own: ModuleType | None = None, factory: Callable[..., Any] | None = None) -> Found:
    """Look through the attributes of a module and its parts, and through what these lead to.

    With `own`, the module of the user's that defines it, also through the globals of `own` that its classes and the
    `factory` read. Parameters, buffers and views of them are left out, and what lies in TorchScript.
    """
    walk = _Walk(module, vars(own) if own is not None else {})
    if isinstance(factory, FunctionType):
        walk.function(factory)
    return Found(tuple(walk.held), tuple(walk.opaque))


class _Walk:
    def __init__(self, module: nn.Module, own: dict[str, Any]) -> None:
        self.held: list[tuple[str, Holding]] = []
        self.opaque: list[str] = []
        self._own, self._seen = own, set[int]()
        self._known = {_place(tensor) for tensor in (*module.parameters(), *module.buffers())}
        parts = dict(module.named_modules())
        self._seen |= {id(part) for part in parts.values()}
        for name, part in parts.items():
            if is_script(part):
                continue
            fields = {key: value for key, value in vars(part).items() if key not in _OF_MODULES}
            if is_exported(part):
                fields = {key: value for key, value in fields.items() if isinstance(value, Tensor)}
            for key, value in fields.items():
                self.visit(f"{name}.{key}" if name else key, value, 0)
            self.kind(type(part))

    def visit(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, _PLAIN) or id(value) in self._seen or depth > _DEEPEST:
            return
        self._seen.add(id(value))
        root = type(value).__module__.partition(".")[0]
        if isinstance(value, Tensor | np.ndarray):
            if _has_values(value) and _place(value) not in self._known:
                self.held.append((name, value))
        elif isinstance(value, nn.Module | ExportedProgram):
            self.held.append((name, value))
        elif root in _RUNTIMES:
            self.opaque.append(f"{name} ({type(value).__name__})")
        else:
            for key, each in self._contents(value, root):
                self.visit(f"{name}.{key}", each, depth + 1)

    def _contents(self, value: Any, root: str) -> Iterable[tuple[Any, Any]]:
        if isinstance(value, Mapping):
            return list(value.items())
        if isinstance(value, list | tuple | AbstractSet):
            return list(enumerate(value))
        if isinstance(value, functools.partial):
            return [("func", value.func), *enumerate(value.args), *value.keywords.items()]
        if isinstance(value, MethodType):
            return [("self", value.__self__)]
        if isinstance(value, FunctionType):
            self.function(value)
            return list(_closure(value))
        if root == "torch" or root in sys.stdlib_module_names:
            return ()
        return list(getattr(value, "__dict__", {}).items())

    def kind(self, kind: type) -> None:
        """A class of the user's file: its attributes, and globals that its methods read."""
        for base in kind.__mro__:
            if not self._own or base.__module__ != self._own["__name__"] or id(base) in self._seen:
                continue
            self._seen.add(id(base))
            for key, value in vars(base).items():
                function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
                if isinstance(function, FunctionType):
                    self.function(function)
                elif not key.startswith("__"):
                    self.visit(f"{base.__name__}.{key}", value, 0)

    def function(self, function: FunctionType) -> None:
        """A function of the user's file: globals that it reads."""
        if function.__globals__ is not self._own or id(function.__code__) in self._seen:
            return
        self._seen.add(id(function.__code__))
        for name in _names(function.__code__):
            value = self._own.get(name)
            if isinstance(value, type):
                self.kind(value)
            else:
                self.visit(f"global {name}", value, 0)


def _names(code: CodeType) -> Iterator[str]:
    """Names of globals, and of attributes, that a function and those within it read."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _closure(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty one
            yield name, cell.cell_contents


def _has_values(value: Tensor | np.ndarray) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > 0 and not value.is_meta
    return value.size > 0 and not value.dtype.hasobject


def _place(value: Tensor | np.ndarray) -> int:
    """Where the values lie in memory: the same for views of one tensor."""
    if isinstance(value, np.ndarray):
        return int(value.__array_interface__["data"][0])
    with suppress(RuntimeError, NotImplementedError):
        return value.untyped_storage().data_ptr() or id(value)
    return id(value)
