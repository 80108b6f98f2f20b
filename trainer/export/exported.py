"""A student as its user runs it: images in, features and what each teacher would say out.

Letters: B images, H and W pixels, T tokens of a map, C channels, K classes.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from kpu.errors import MismatchError
from kpu.pixels.resize import geometry, resize_image
from trainer.export.description import StudentDescription
from trainer.export.inputs import Images, load_images
from trainer.objective.normalize import Normalizer
from trainer.objective.projectors import Projectors, slot
from trainer.students.base import Student
from trainer.students.models import BaseModel

BASE_PREFIX: Final = "base."


class Affine(nn.Module):
    """x * scale + shift per channel, or x @ matrix + shift."""

    def __init__(self, channels: int, *, matrix: bool = False) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(channels, channels) if matrix else torch.ones(channels))
        self.register_buffer("shift", torch.zeros(channels))
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to float32 [..., C]."""
        x = x.float()
        return (x @ self.scale if self.scale.ndim == 2 else x * self.scale) + self.shift

    def inverse(self, y: Tensor) -> Tensor:
        """The x behind y; per channel only."""
        return (y.float() - self.shift) / self.scale

    def become(self, normalizer: Normalizer) -> None:
        """Take a normaliser's way from targets to a teacher's own units."""
        channels = len(self.shift)
        with torch.no_grad():
            zero = normalizer.raw(torch.zeros(1, channels)).double()[0]
            unit = normalizer.raw(torch.eye(channels)).double() - zero
            self.shift.copy_(zero)
            self.scale.copy_(unit if self.scale.ndim == 2 else unit.diagonal())


class ExportedStudent(nn.Module):
    """A student on images, with its projectors and the teachers' own classifiers.

    `student(images)` takes a file, an image of Pillow, a uint8 array [H, W, 3] or the bytes of a file, of any size, or
    several of these; or a uint8 tensor [B, H, W, 3] of the student's own size. It gives a dictionary:
        `global` [B, D] and `patch` [B, T, D]: the features, in standard deviations of the base's own outputs;
        `logits` [B, K]: the base's own classifier on them, where it has one;
        `teachers`: by name, `global` and `patch` as that teacher would give them, in its own units and on its own grid,
            and `logits` [B, K] where it has a classifier.
    """

    def __init__(self, description: StudentDescription, student: Student, base: BaseModel | None) -> None:
        super().__init__()
        self.description = description
        self.student = student
        self.base = base
        shapes = description.base_shapes
        self.units = nn.ModuleDict({_key(o): Affine(shapes[o].channels) for o in description.inputs})
        self.projectors = Projectors(student.shapes, description.shapes, description.projector)
        self.scales = nn.ModuleDict(
            {
                slot(name, o): Affine(shape.channels, matrix=slot(name, o) in description.matrices)
                for name, outputs in description.shapes.items()
                for o, shape in outputs.items()
            }
        )
        self.heads = nn.ModuleDict(
            {
                slot(name, "head"): nn.Linear(description.shapes[name]["global"].channels, classes)
                for name, classes in description.heads.items()
            }
        )
        self.register_buffer("mean", torch.tensor(description.input.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(description.input.std).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, images: Images) -> dict[str, Any]:
        """Images to features and predictions, all float32; B is 1 for one image. See the class.

        Raises:
            MismatchError: pixels of another size or type, something that is no image, or cannot be decoded.
            SourceError: a file cannot be read.
        """
        pixels_BHWC = images if isinstance(images, Tensor) and images.ndim != 3 else self.pixels(images)
        size = self.description.input.size
        if pixels_BHWC.dtype != torch.uint8 or tuple(pixels_BHWC.shape[1:]) != (*size, 3):
            raise MismatchError(
                f"images: expected uint8 [B, {size[0]}, {size[1]}, 3], found {pixels_BHWC.dtype} "
                f"{list(pixels_BHWC.shape)}; the student runs at {size[0]} x {size[1]} alone: give images in a list, "
                "of any size, or what `pixels` makes of them"
            )
        x_BCHW = (pixels_BHWC.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        return self.predict(self.encode(x_BCHW))

    def encode(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Normalised images to the student's features, z'."""
        found: dict[str, Tensor] = self.student(self.base_features(x_BCHW), x_BCHW)
        return found

    def base_features(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Normalised images to the base's standardised outputs; empty if the student looks at images itself."""
        if self.base is None:
            return {}
        return {output: self.unit(output).inverse(y) for output, y in self.base(x_BCHW).items()}

    def predict(self, features: Mapping[str, Tensor]) -> dict[str, Any]:
        """What `forward` gives, from features z'."""
        result: dict[str, Any] = {output: z.float() for output, z in features.items()}
        name = self.description.base.name
        if name in self.description.heads:
            own = result["global"][..., : self.description.base_shapes["global"].channels]
            result["logits"] = self.heads[slot(name, "head")](self.unit("global")(own))
        result["teachers"] = {}
        for teacher in self.description.shapes:
            targets = self.projectors(features, teacher)
            said: dict[str, Tensor] = {o: self.scales[slot(teacher, o)](target) for o, target in targets.items()}
            if teacher in self.description.heads:
                said["logits"] = self.heads[slot(teacher, "head")](said["global"])
            result["teachers"][teacher] = said
        return result

    def pixels(self, images: Images) -> Tensor:
        """Images as the extraction saw them: uint8 [B, H, W, 3] on the module's device. Raises as `forward`."""
        how = geometry(self.description.input)
        found = np.stack([resize_image(image, how) for image in load_images(images, self.description.decoding)])
        return torch.from_numpy(found).to(self.mean.device)

    def unit(self, output: str) -> Affine:
        """From z' to the base's own units of an output."""
        unit = self.units[_key(output)]
        assert isinstance(unit, Affine)
        return unit

    def own_state(self) -> dict[str, Tensor]:
        """Every tensor but the base's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(BASE_PREFIX)}


def _key(output: str) -> str:
    """A name that a module may have."""
    return output.replace(".", "/")
