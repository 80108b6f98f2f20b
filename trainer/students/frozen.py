"""The control: the frozen base itself, so that only the projectors learn."""

from collections.abc import Sequence

from torch import Tensor

from trainer.students.base import BaseInfo, Student


class FrozenStudent(Student):
    """z' is the base's standardised output; there are no parameters."""

    def __init__(self, base: BaseInfo, outputs: Sequence[str]) -> None:
        super().__init__({output: base.shapes[output] for output in outputs})

    def forward(self, base: dict[str, Tensor], images: Tensor | None = None) -> dict[str, Tensor]:  # noqa: ARG002
        """The base's outputs as they are."""
        return {output: base[output] for output in self.shapes}
