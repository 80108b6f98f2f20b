"""What every student has in common.

Letters: B rows, T tokens of a map, D channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from kpu.format.statistics import Statistics
from kpu.format.teacher import InputSpec, TeacherSpec
from trainer.data.shapes import OutputShape


@dataclass(frozen=True)
class BaseInfo:
    """The base as its cache describes it; `seed` is its plan's, with which `weights: random` were drawn."""

    spec: TeacherSpec
    shapes: Mapping[str, OutputShape]
    statistics: Mapping[str, Statistics]
    seed: int = 0


class Student(nn.Module):
    """Maps a batch to z', its features in units of the base's standardised outputs.

    `shapes` says what `forward` gives, by output. `input` is how images must be preprocessed, None if the student
    needs none.
    """

    def __init__(self, shapes: Mapping[str, OutputShape], input: InputSpec | None = None) -> None:  # noqa: A002
        super().__init__()
        self.shapes, self.input = dict(shapes), input

    @property
    def needs_images(self) -> bool:
        """Whether `forward` needs images."""
        return self.input is not None

    def forward(self, base: dict[str, Tensor], images: Tensor | None = None) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            base: the base's standardised outputs by name, float32 [B, D] and [B, T, D].
            images: float32 [B, 3, H, W], normalised as `input` says.

        Returns:
            z' by output, [B, D] and [B, T, D].
        """
        raise NotImplementedError
