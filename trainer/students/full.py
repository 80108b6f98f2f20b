"""A student that is a model trained whole.

Letters: B images, D channels, H and W the image.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from kpu.trust.code import CodeLoader
from trainer.objective.losses import resize_map
from trainer.sections import StudentConfig
from trainer.students.base import BaseInfo, Student
from trainer.students.models import as_tokens, build_model, probe


class FullStudent(Student):
    """Any model, trained whole; a linear map and a resize bring its outputs to z' where width or grid differ.

    Raises:
        ConfigError: the model is unknown, or does not give the outputs.
        MismatchError: the weights do not fit it, or its code is another than was recorded.
        TrustError: its code may not run.
    """

    def __init__(
        self, config: StudentConfig, base: BaseInfo, outputs: Sequence[str], codes: CodeLoader | None = None
    ) -> None:
        assert config.model is not None
        model, own = build_model(config.model, config.weights, outputs, codes=codes)
        super().__init__({output: base.shapes[output] for output in outputs}, own)
        self.model = model
        self.given = probe(model, own.size, outputs, config.model)
        self.maps = nn.ModuleDict(
            {
                output: nn.Linear(shape.channels, self.shapes[output].channels)
                for output, shape in self.given.items()
                if shape.channels != self.shapes[output].channels
            }
        )

    def forward(self, base: dict[str, Tensor], images: Tensor | None = None) -> dict[str, Tensor]:  # noqa: ARG002
        """Images [B, 3, H, W] to z'."""
        found = self.model(images)
        result: dict[str, Tensor] = {}
        for output, shape in self.shapes.items():
            z = as_tokens(found[output])
            if output in self.maps:
                z = self.maps[output](z)
            grid = self.given[output].grid
            result[output] = z if grid is None or shape.grid is None else resize_map(z, grid, shape.grid)
        return result
