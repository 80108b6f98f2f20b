"""Compiled programs as teachers, or within them: TorchScript modules and what `torch.export` gives.

They are modules without Python code: their graph is a part of what computes, they have no `requires_grad_` or no
`eval`, and a mode of training that was compiled in stays.
"""

import hashlib
import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kpu.errors import TeacherError
from kpu.util.digests import DIGEST_BYTES, canonical_json

_MANGLED: Final = re.compile(rb"___torch_mangle_\d+\.?")  # numbers that differ from process to process
_NOT_CONTENT: Final = (".debug_pkl", "serialization_id", "/version", "/byteorder", ".data/")
_TOLERANCE: Final = 1e-2  # of the largest feature: far above rounding, far below what dropout or batch statistics do


def is_script(module: nn.Module) -> bool:
    """Whether this is a TorchScript module."""
    return isinstance(module, torch.jit.ScriptModule)


def is_exported(module: nn.Module) -> bool:
    """Whether this is a module of `ExportedProgram.module()`: a graph whose `train` and `eval` were replaced."""
    return isinstance(module, torch.fx.GraphModule) and "train" in vars(module)


def programs(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Programs within a module, or the module itself, by name; none within another one."""
    inside: list[str] = []
    for name, part in module.named_modules():
        if any(name.startswith(outer) for outer in inside) or not (is_script(part) or is_exported(part)):
            continue
        inside.append(f"{name}." if name else "")
        yield name, part


def freeze(module: nn.Module) -> nn.Module:
    """The module in evaluation mode, without gradients, as far as its parts know either."""
    for _, part in programs(module):
        if is_exported(part):  # its graph knows no mode; what was compiled in is found by `check_rows_alone`
            vars(part)["train"] = vars(part)["eval"] = lambda *_, own=part: own
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def check_rows_alone(features: Callable[[Tensor], Any], x_BCHW: Tensor, who: str) -> None:
    """Refuse a program whose features of an image depend on chance or on the other images of the batch.

    Raises:
        TeacherError: it was compiled in training mode, with dropout or the statistics of the batch.
    """
    with torch.inference_mode():
        one, other = features(x_BCHW), features(torch.cat([x_BCHW[:1], x_BCHW[1:].flip(-1) * 0.5]))
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return
    for name, tensor in one.items():
        if not isinstance(tensor, Tensor) or not isinstance(other.get(name), Tensor) or not tensor.ndim:
            continue
        first, again = tensor[:1].float(), other[name][:1].float()
        if first.shape != again.shape or (first - again).abs().max() > _TOLERANCE * first.abs().max():
            raise TeacherError(
                f"{who}: output {name!r}: expected features of an image that depend on this image alone, found others "
                "beside another image: the program was compiled in training mode, with dropout or batch statistics; "
                "call eval() on the model before it is scripted, traced or exported"
            )


def script_digest(module: Any) -> str:
    """Digest of code, constants, attributes and parameters of a TorchScript module."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # that TorchScript has a successor
        torch.jit.save(module, buffer)
    with zipfile.ZipFile(buffer) as archive:
        entries = []
        for name in archive.namelist():
            if not any(part in name for part in _NOT_CONTENT):
                content = _MANGLED.sub(b"", archive.read(name))
                inner = _MANGLED.sub(b"", name.partition("/")[2].encode()).decode()
                entries.append([inner, hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()])
    return hashlib.blake2b(canonical_json(sorted(entries)), digest_size=DIGEST_BYTES).hexdigest()


def exported_text(module: nn.Module) -> list[str]:
    """The code of an exported graph, of the graphs in it, and how its inputs and outputs are named."""
    graphs = [part for part in module.modules() if isinstance(part, torch.fx.GraphModule)]
    specs = [str(getattr(module, name, None)) for name in ("_in_spec", "_out_spec")]
    return [graph.code for graph in graphs] + specs


def as_module(made: Any) -> Any:
    """What a factory returned; of an exported program the module."""
    return made.module() if isinstance(made, ExportedProgram) else made


def linear_of(part: Any) -> nn.Linear | None:
    """A linear layer within a program as a plain one; None if it is none."""
    weight, bias = getattr(part, "weight", None), getattr(part, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not (bias is None or isinstance(bias, Tensor)):
        return None
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return linear
