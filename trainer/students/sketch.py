"""Models built without memory, to be compared with tensors at hand before any of their size is allocated.

A file that says how large a model is may be anyone's: a few bytes of it can describe any amount of memory. A sketch is
the model on torch's `meta` device. It is given up once it has many more tensors, or larger ones, than those at hand.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from kpu.errors import MismatchError

T = TypeVar("T")
_BUILDS: Final = 8
"""timm models are built several times: with their own size and classes, and with those of the weights."""
_FEW: Final = 2**12
_SMALL: Final = 2**24
"""Values that a build may have beyond its weights: a classifier that is dropped, positions of a larger map."""
_MODULES: Final = 32  # that hold one tensor, on average


class TooLargeError(MismatchError):
    """A model is described that has more than the tensors at hand."""


class Rehearsal:
    """What running a sketch showed of shapes, in order, for the model itself to be built without running it."""

    def __init__(self) -> None:
        self._found: deque[Any] = deque()
        self._again = False

    @contextmanager
    def sketching(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Build on the `meta` device, up to what `tensors` can fill.

        Raises:
            TooLargeError: more is built.
        """
        with _limited(tensors), self._current(), torch.device("meta"):
            yield

    @contextmanager
    def performing(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Build what was sketched, under the same limit: of models that cannot be sketched nothing else is known.

        Raises:
            TooLargeError: more is built.
        """
        self._again = True
        with _limited(tensors), self._current():
            yield

    @contextmanager
    def _current(self) -> Iterator[None]:
        token = _rehearsal.set(self)
        try:
            yield
        finally:
            _rehearsal.reset(token)

    def take(self, find: Callable[[], T]) -> T:
        """What `find` gives, or gave in the sketch."""
        if self._again and self._found:
            found: T = self._found.popleft()
            return found
        found = find()
        if not self._again:
            self._found.append(found)
        return found


_rehearsal: ContextVar[Rehearsal | None] = ContextVar("rehearsal", default=None)


def rehearsed(find: Callable[[], T]) -> T:
    """What `find` gives, by running a model, or gave when its sketch was run."""
    rehearsal = _rehearsal.get()
    return find() if rehearsal is None else rehearsal.take(find)


def is_sketch(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are tensors of a sketch, which have no values."""
    return any(tensor.is_meta for tensor in tensors.values())


def misfits(sketch: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """What keeps `tensors` from being those of the sketched model, one phrase a tensor: names, shapes and types."""
    phrases = []
    for name in dict.fromkeys([*sketch, *tensors]):
        wanted, found = (_said(each.get(name)) for each in (sketch, tensors))
        if wanted != found:
            phrases.append(f"{name}: expected {wanted}, found {found}")
    return phrases


def check_depth(args: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> None:
    """Check that arguments of an architecture name no more blocks than there are tensors, for each has some.

    Raises:
        TooLargeError: they do; some models compute with the number of blocks before they build the first.
    """
    for name, value in (args or {}).items():
        counts = value if isinstance(value, list | tuple) else [value]
        blocks = sum(count for count in counts if isinstance(count, int))
        if ("depth" in name or "layers" in name) and blocks > len(tensors):
            raise TooLargeError(f"model_args.{name}: expected at most {len(tensors):,} blocks, found {blocks:,}")


def _said(tensor: Tensor | None) -> str:
    return "no such tensor" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


@contextmanager
def _limited(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    values = _BUILDS * sum(tensor.numel() for tensor in tensors.values()) + _SMALL
    count = _BUILDS * len(tensors) + _FEW
    built = {"tensors": 0, "values": 0, "modules": 0}

    def spend(what: str, amount: int, limit: int) -> None:
        built[what] += amount
        if built[what] > limit:
            raise TooLargeError(
                f"describes a model of over {limit:,} {what}: expected about the {len(tensors):,} tensors of "
                f"{sum(tensor.numel() for tensor in tensors.values()):,} values that are there"
            )

    def of_tensor(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        spend("tensors", 1, count)
        spend("values", 0 if tensor is None else tensor.numel(), values)

    def of_module(_module: nn.Module, _name: str, _part: nn.Module | None) -> None:
        spend("modules", 1, _MODULES * count)

    handles = [
        register_module_parameter_registration_hook(of_tensor),
        register_module_buffer_registration_hook(of_tensor),
        register_module_module_registration_hook(of_module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
