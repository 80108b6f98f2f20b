"""What a feature looks like: channels, and the grid of a map."""

from typing import NamedTuple

from kpu.format.teacher import OutputSpec

TokenGrid = tuple[int, int]
"""(H, W); the tokens of a map lie row by row."""


class OutputShape(NamedTuple):
    """A vector [B, C] where `grid` is None, else a map [B, H * W, C]."""

    channels: int
    grid: TokenGrid | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a row; 1 for a vector."""
        return 1 if self.grid is None else self.grid[0] * self.grid[1]


def shape_of(output: OutputSpec) -> OutputShape:
    """The shape of a teacher's output as the cache describes it."""
    return OutputShape(output.channels, output.grid)
