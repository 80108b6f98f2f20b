"""Which tensors of a checkpoint are meant, and what keeps them from fitting a model, without torch."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeGuard

WRAPPERS: Final = ("state_dict", "model")  # entries that are unwrapped unasked
COUNTER: Final = "num_batches_tracked"  # absent from checkpoints of older torch versions, and without effect on results
NAMED_AT_MOST: Final = 5
_PREFIX: Final = "module."
Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by name, in the order of the model or the file."""


def split_entry(weights: str) -> tuple[str, str | None]:
    """The file and the entry of `path/to/file.pth#entry`; no entry where a file has this very name."""
    path, mark, entry = weights.rpartition("#")
    return (path, entry) if mark and path and entry and not Path(weights).exists() else (weights, None)


def pick_tensors(
    checkpoint: Any, entry: str | None, is_tensor: Callable[[Any], bool], same: Callable[[Any, Any], bool]
) -> dict[str, Any]:
    """The tensors that are meant, by name, without `module.` where every name has it.

    Args:
        checkpoint: what the file holds: tensors by name, or entries that hold them.
        entry: which of these; None for the one called `state_dict` or `model`, or the file as a whole.
        is_tensor: tells tensors from other values.
        same: whether two tensors are equal.

    Raises:
        ValueError: it holds no such tensors; or, with no entry named, others under the same names as well, such as the
            moving average that timm keeps beside the weights. The message is a clause.
    """

    def holds_tensors(value: Any) -> TypeGuard[Mapping[str, Any]]:
        return isinstance(value, Mapping) and bool(value) and all(is_tensor(each) for each in value.values())

    if not isinstance(checkpoint, Mapping):
        raise ValueError("holds no state_dict: expected tensors by name")  # about a file
    states = {name: _bare(value) for name, value in checkpoint.items() if holds_tensors(value)}
    if entry is not None:
        if entry not in states:
            raise ValueError(f"expected an entry {entry!r} of tensors by name, found {', '.join(states) or 'none'}")
        return states[entry]
    taken = next((name for name in WRAPPERS if isinstance(checkpoint.get(name), Mapping)), None)
    if taken is None and holds_tensors(checkpoint):
        return _bare(checkpoint)
    if taken not in states:
        advice = f"; it has {', '.join(states)}: write #{next(iter(states))} behind the path, say" if states else ""
        raise ValueError(f"holds no state_dict: expected tensors by name{advice}")
    own = states[taken]
    others = [
        name
        for name, other in states.items()
        if name != taken and other.keys() == own.keys() and not all(same(own[key], other[key]) for key in own)
    ]
    if others:
        names = [taken, *others]
        raise ValueError(
            f"holds several sets of weights, {', '.join(names)}; write "
            f"{' or '.join(f'#{name}' for name in names)} behind its path (evaluation by timm takes the moving "
            "average, whose name has `ema` in it), or save the one that is meant to a file of its own"
        )
    return own


def _bare(state: Mapping[str, Any]) -> dict[str, Any]:
    prefix = _PREFIX if all(isinstance(name, str) and name.startswith(_PREFIX) for name in state) else ""
    return {str(name).removeprefix(prefix): tensor for name, tensor in state.items()}


def list_misfits(expected: Shapes, found: Shapes) -> list[str]:
    """What keeps tensors from fitting a model, one phrase a tensor; empty if they fit."""
    phrases = []
    for name, shape in expected.items():
        if name not in found:
            if not name.endswith(COUNTER):
                phrases.append(f"{name}: expected shape {list(shape)}, found no such tensor")
        elif found[name] != shape:
            phrases.append(f"{name}: expected shape {list(shape)}, found {list(found[name])}")
    unknown = [name for name in found if name not in expected]
    return phrases + [f"{name}: expected no such tensor, found {list(found[name])}" for name in unknown]


def explain_misfits(expected: Shapes, found: Shapes) -> str:
    """The first misfits, and what the file holds instead, as a clause."""
    misfits = list_misfits(expected, found)
    rest = len(misfits) - NAMED_AT_MOST
    listed = "; ".join(misfits[:NAMED_AT_MOST]) + (f"; and {rest} more" if rest > 0 else "")
    unknown = [name for name in found if name not in expected]
    if not unknown:
        return listed
    names = ", ".join(unknown[:NAMED_AT_MOST]) + (", ..." if len(unknown) > NAMED_AT_MOST else "")
    fitting = sum(name in expected and shape == expected[name] for name, shape in found.items())
    held = f"{listed}. Of the file's {len(found)} tensors {fitting} fit; unknown are {names}"
    return held + _renamed(expected, found)


def _renamed(expected: Shapes, found: Shapes) -> str:
    """What to do where the file holds the same shapes in the same order, under other names."""
    wanted, given = (
        [(name, shape) for name, shape in shapes.items() if not name.endswith(COUNTER)] for shapes in (expected, found)
    )
    if [shape for _, shape in wanted] != [shape for _, shape in given]:
        return ""
    pairs = [(new, old) for (new, _), (old, _) in zip(wanted, given, strict=True) if new != old]
    shown = ", ".join(f"{old} for {new}" for new, old in pairs[:2])
    return (
        f". All {len(wanted)} have, in order, the shapes that are expected, so these may be the right weights under "
        f"other names ({shown}): rename them in the file"
    )
