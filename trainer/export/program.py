"""A student as a torch.export program: it runs where torch is, without KPU, timm or the student's code.

Letters: B images, H and W pixels.
"""

import io
import re
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kpu.errors import MismatchError
from trainer.export.exported import ExportedStudent

PROGRAM: Final = "student.pt2"
SAME: Final = 1e-3
"""Relative root mean square error allowed between two ways to run one model on the same pixels."""


class _Plain(nn.Module):
    """The module with every tensor under a name that is an identifier: names of teachers are none."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = (module,)  # not registered: its tensors are, below
        self._names: dict[str, str] = {}
        for number, (name, tensor) in enumerate([*module.named_parameters(), *module.named_buffers()]):
            plain = f"{re.sub(r'[^a-zA-Z0-9]', '_', name)}_{number}"
            self._names[plain] = name
            self.register_buffer(plain, tensor.detach())

    def forward(self, images: Tensor) -> Any:
        """As the module."""
        tensors: Mapping[str, Tensor] = {name: getattr(self, plain) for plain, name in self._names.items()}
        return functional_call(self._module[0], dict(tensors), (images,))


def make_program(module: ExportedStudent, pixels_BHWC: Tensor) -> bytes:
    """The bytes of a program for any number of images, uint8 [B, H, W, 3], checked against the module on these.

    Raises:
        MismatchError: the program gives something else.
        Exception: whatever torch raises at code that it cannot trace.
    """
    sample = pixels_BHWC[:2] if len(pixels_BHWC) > 1 else pixels_BHWC.repeat(2, 1, 1, 1)
    with torch.no_grad():
        module(sample)  # resize matrices are made once and kept: not while tracing
        batch = torch.export.Dim("batch")
        traced = torch.export.export(_Plain(module), (sample,), dynamic_shapes=({0: batch},), strict=False)
        sink = io.BytesIO()
        torch.export.save(traced, sink)
        data = sink.getvalue()
        again, own = torch.export.load(io.BytesIO(data)).module()(pixels_BHWC), module(pixels_BHWC)
    for output in module.description.outputs:
        error = relative_rmse(again[output], own[output])
        if not error <= SAME:
            raise MismatchError(
                f"{PROGRAM}: {output}: expected what the student gives within {SAME:g}, found {error:.3g}"
            )
    return data


def relative_rmse(found: Tensor, expected: Tensor) -> float:
    """Root mean square difference over the root mean square of `expected`."""
    expected = expected.double()
    return float((found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())
