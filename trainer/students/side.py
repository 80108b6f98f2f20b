"""A student that needs neither images nor a backbone: an adapter on the cached outputs of the base.

Letters: B rows, T tokens of the base's map, D channels of the student.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kpu.errors import ConfigError
from trainer.data.shapes import OutputShape
from trainer.sections import StudentConfig
from trainer.students.adapters import MapAdapter, VectorAdapter
from trainer.students.base import BaseInfo, Student


class SideStudent(Student):
    """z' = base + gamma * adapter (`add`), or [base, adapter] (`concat`, D + width channels, the base's first).

    It reads the base's outputs that are targets, and `student.layers`. gamma, per channel, is zero at the start and the
    adapter's last layer is not: training starts exactly at the base, and gamma learns at the first step.

    Raises:
        ConfigError: the base has no such layer.
    """

    def __init__(self, config: StudentConfig, base: BaseInfo, outputs: Sequence[str]) -> None:
        names = tuple(dict.fromkeys([*outputs, *config.layers]))
        for name in names:
            if name not in base.shapes:
                raise ConfigError(
                    f"student.layers: expected outputs of the base, among {sorted(base.shapes)}, found {name!r}; "
                    "name one of these"
                )
        wider = config.width if config.concat else 0
        super().__init__({o: OutputShape(base.shapes[o].channels + wider, base.shapes[o].grid) for o in outputs})
        self.concat = config.concat
        inputs = {name: base.shapes[name] for name in names}
        channels = {o: config.width if self.concat else base.shapes[o].channels for o in outputs}
        grids = [shape.grid for shape in inputs.values() if shape.grid is not None]
        target = inputs["patch"].grid if "patch" in inputs else min(grids, key=math.prod, default=None)
        self.adapter: nn.Module = (
            VectorAdapter(inputs, channels["global"], config.width, config.depth)
            if target is None
            else MapAdapter(inputs, target, channels, config.width, config.depth)
        )
        self.gamma = nn.ParameterDict({} if self.concat else {o: torch.zeros(n) for o, n in channels.items()})

    def forward(self, base: dict[str, Tensor], images: Tensor | None = None) -> dict[str, Tensor]:  # noqa: ARG002
        """The base's standardised outputs and layers to z'."""
        changes = self.adapter(base)
        if self.concat:
            return {o: torch.cat([base[o], changes[o].to(base[o].dtype)], dim=-1) for o in self.shapes}
        return {o: base[o] + self.gamma[o] * changes[o] for o in self.shapes}
