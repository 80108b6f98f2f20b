"""A student on images: the frozen base with a trainable bottleneck in parallel to each block (AdaptFormer, 2205.13535).

Letters: B images, T tokens, D channels.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kpu.errors import ConfigError, MismatchError
from kpu.trust.code import CodeLoader
from trainer.data.shapes import TokenGrid
from trainer.sections import StudentConfig
from trainer.students.adapters import Beside, Bottleneck
from trainer.students.base import BaseInfo, Student
from trainer.students.models import as_tokens, build_model, probe
from trainer.students.sketch import rehearsed

_CONTAINER = re.compile(r"(^|\.)(blocks|layers|stages|layer\d+)$")  # how timm and torchvision name lists of blocks


class ParallelStudent(Student):
    """z' = the adapted model's outputs, standardised by the base's statistics in float32.

    Every gamma is zero at the start, so that training starts exactly at the base. The model itself stays in evaluation
    mode and has no gradients. `student.width` is the width of the bottlenecks.

    Raises:
        ConfigError: the model is unknown, has no blocks to put an adapter beside, lacks an output, or its
            base was imported.
        MismatchError: the code, the weights or the shapes of the outputs are not the base's.
        TrustError: its code may not run.
    """

    def __init__(
        self, config: StudentConfig, base: BaseInfo, outputs: Sequence[str], codes: CodeLoader | None = None
    ) -> None:
        super().__init__({output: base.shapes[output] for output in outputs}, base.spec.known_input)
        name, weights = config.model or base.spec.model, config.weights
        if config.model is None and weights is None:
            weights = base.spec.weights
        size = base.spec.known_input.size
        recorded = base.spec.source_digest if config.model is None else None
        args = base.spec.model_args if name == base.spec.model else None
        model, _ = build_model(
            name, weights, outputs, size=size, seed=base.seed, codes=codes, recorded=recorded, args=args
        )
        found = probe(model, size, outputs, name)
        if found != self.shapes:
            raise MismatchError(
                f"student.model: {name}: expected the base's outputs {self.shapes}, found {found}; "
                "give the base's model"
            )
        self.model = model.requires_grad_(False)
        self.besides = _adapt(self.model, size, config.width, name)
        for output in outputs:
            statistics = base.statistics[output]
            self.register_buffer(f"centre_{output}", torch.tensor(statistics.centre, dtype=torch.float32))
            self.register_buffer(f"std_{output}", torch.tensor(statistics.std, dtype=torch.float32))
        self.train(self.training)

    def train(self, mode: bool = True) -> "ParallelStudent":
        """As usual, but the model stays in evaluation mode: adapters behave alike in both."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, base: dict[str, Tensor], images: Tensor | None = None) -> dict[str, Tensor]:  # noqa: ARG002
        """Images [B, 3, H, W] to z', float32."""
        found = self.model(images)
        result: dict[str, Tensor] = {}
        for output in self.shapes:
            centre, std = getattr(self, f"centre_{output}"), getattr(self, f"std_{output}")
            result[output] = (as_tokens(found[output]).float() - centre) / std
        return result

    def check_against(self, cached: Mapping[str, Tensor], images: Tensor, tolerance: float) -> None:
        """Compare the model without its adapters with what the cache holds for the same rows, all of them valid.

        Args:
            cached: the base's standardised outputs, [B, D] and [B, T, D].
            images: float32 [B, 3, H, W], normalised as `input` says.
            tolerance: the largest root mean square difference of a row, in channel standard deviations.

        Raises:
            MismatchError: a row of an output differs by more.
        """
        with torch.no_grad(), self.bare():
            found = self({}, images)
        for output, z in found.items():
            error_B = (z - cached[output].float()).square().flatten(1).mean(dim=1).sqrt()
            worst = int(error_B.argmax())
            largest = float(error_B[worst])
            if not largest <= tolerance:  # also where it is not a number
                raise MismatchError(
                    f"student.model: {output}: expected the base's cached features within {tolerance:g} standard "
                    f"deviations, found {largest:.4g} in image {worst} of the batch (mean {error_B.mean():.4g}); give "
                    "the base's model and weights, and the images that the cache was made from"
                )

    @contextmanager
    def bare(self) -> Iterator[None]:
        besides = [part for part in self.model.modules() if isinstance(part, Beside)]
        for part in besides:
            part.active = False
        try:
            yield
        finally:
            for part in besides:
                part.active = True


def _adapt(model: nn.Module, size: TokenGrid, width: int, name: str) -> int:
    """Put a bottleneck beside each block of `model`; their number."""
    modules = dict(model.named_modules())
    lists = [path for path, part in modules.items() if _is_list(path, part)]
    innermost = [path for path in lists if not any(other.startswith(f"{path}.") for other in lists)]
    blocks = [(modules[path], key, block) for path in innermost for key, block in modules[path].named_children()]
    seen = rehearsed(lambda: _shapes(model, size, [block for _, _, block in blocks]))
    last = getattr(getattr(model, "model", model), "output_fmt", "NCHW") == "NHWC"
    made = 0
    for number, (parent, key, block) in enumerate(blocks):
        if number in seen:
            setattr(parent, key, Beside(block, _bottleneck(*seen[number], width, last, f"{name}: {key}")))
            made += 1
    if not made:
        raise ConfigError(
            f"student.model: {name}: expected blocks in modules named blocks, layers, stages or layer<i>, found none; "
            "use kind full"
        )
    return made


def _is_list(path: str, part: nn.Module) -> bool:
    return isinstance(part, nn.Sequential | nn.ModuleList) and _CONTAINER.search(path) is not None and len(part) > 0


def _shapes(model: nn.Module, size: TokenGrid, blocks: Sequence[nn.Module]) -> dict[int, tuple[torch.Size, torch.Size]]:
    """Shapes of what goes into and comes out of each block, by number, that runs and maps a tensor to a tensor."""
    seen: dict[int, tuple[torch.Size, torch.Size]] = {}

    def note(number: int, _block: nn.Module, arguments: Any, found: Any) -> None:
        if arguments and isinstance(arguments[0], Tensor) and isinstance(found, Tensor):
            seen[number] = (arguments[0].shape, found.shape)

    handles = [block.register_forward_hook(partial(note, number)) for number, block in enumerate(blocks)]
    with torch.no_grad():
        model.eval()(torch.zeros(2, 3, *size))
    for handle in handles:
        handle.remove()
    return seen


def _bottleneck(given: torch.Size, found: torch.Size, width: int, last: bool, where: str) -> Bottleneck:
    """An adapter for a block from shape `given` to `found`, with channels last or after the batch."""
    axis = 1 if len(given) == 4 and not last else -1
    before = [n for i, n in enumerate(given) if i not in (0, axis % len(given))]
    after = [n for i, n in enumerate(found) if i not in (0, axis % len(found))]
    stride = tuple(-(-a // b) for a, b in zip(before, after, strict=True)) if len(before) == 2 else (1, 1)
    reached = [-(-a // s) for a, s in zip(before, stride, strict=True)] if len(before) == 2 else before
    if reached != after:
        raise ConfigError(
            f"student.model: {where}: expected a block that keeps or divides its grid, found {before} to {after}"
        )
    return Bottleneck(given[axis], width, found[axis], axis, (stride[0], stride[1]))
