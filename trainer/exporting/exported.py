"""A student as its user runs it: images in, features and what each teacher would say out.

Letters: B images, H and W pixels, T tokens of a map, C channels, K classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from cache.errors import CorruptError, MismatchError
from cache.pixels.decode import decode_image, image_to_rgb
from cache.pixels.resize import geometry, resize_image
from cache.reasons import reason, remedy
from cache.spec import Decoding, ImageStatus
from cache.statistics import Statistics
from trainer.exporting.description import BASE, STUDENT, Description, read_bytes, read_description
from trainer.objective.normalize import Normalizer
from trainer.objective.projectors import Projectors, slot
from trainer.students import BaseInfo, Student, make_student
from trainer.students.models import BaseModel, build_base
from trainer.students.weights import RANDOM, load_strictly

_BASE_PREFIX: Final = "base."

Images = Tensor | Sequence[Image.Image | bytes | Path]
"""uint8 [B, H, W, 3] pixels of the input's size, or any images: of Pillow, encoded bytes, or files."""


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

    `student(images)` gives a dictionary:
        `global` [B, D] and `patch` [B, T, D]: the features, in standard deviations of the base's own outputs;
        `logits` [B, K]: the base's own classifier on them, where it has one;
        `teachers`: by name, `global` and `patch` as that teacher would give them, in its own units and on its own grid,
            and `logits` [B, K] where it has a classifier.
    """

    def __init__(self, description: Description, student: Student, base: BaseModel | None) -> None:
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
        """Images to features and predictions, all float32. See the class.

        Raises:
            MismatchError: pixels of another size or type, or an image that cannot be decoded.
        """
        pixels_BHWC = images if isinstance(images, Tensor) else self.pixels(images)
        size = self.description.input.size
        if pixels_BHWC.dtype != torch.uint8 or tuple(pixels_BHWC.shape[1:]) != (*size, 3):
            raise MismatchError(
                f"images: expected uint8 [B, {size[0]}, {size[1]}, 3], found {pixels_BHWC.dtype} "
                f"{list(pixels_BHWC.shape)}; give a list of images, or what `pixels` makes of them"
            )
        x_BCHW = (pixels_BHWC.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        return self.predict(self.encode(x_BCHW))

    def encode(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Normalised images to the student's features, z'."""
        found: dict[str, Tensor] = self.student(self.base_features(x_BCHW), x_BCHW)
        return found

    def base_features(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Normalised images to the base's standardised outputs; empty where the student looks at images itself."""
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

    def pixels(self, images: Sequence[Image.Image | bytes | Path]) -> Tensor:
        """Images as the extraction saw them: uint8 [B, H, W, 3] on the module's device."""
        how = geometry(self.description.input)
        found = np.stack([resize_image(_rgb(image, self.description.decoding), how) for image in images])
        return torch.from_numpy(found).to(self.mean.device)

    def unit(self, output: str) -> Affine:
        """From z' to the base's own units of an output."""
        unit = self.units[_key(output)]
        assert isinstance(unit, Affine)
        return unit

    def own_state(self) -> dict[str, Tensor]:
        """Every tensor but the base's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(_BASE_PREFIX)}


def load_student(folder: str | Path) -> ExportedStudent:
    """Load what `kpu-train export` wrote, on the CPU and in evaluation mode.

    A `torch:` model's Python file in the folder, or where `config.json` names it, is run: load only what you trust.

    Raises:
        ConfigError: there is no exported student, or what it refers to is not there.
        CorruptError: a file is damaged.
        MismatchError: the base that it refers to has other weights or other code.
    """
    place = Path(folder)
    description = read_description(place)
    here = description.model_copy(
        update={
            "base": description.base.model_copy(update={"model": _in(place, description.base.model)}),
            "student": description.student.model_copy(
                update={"model": _in(place, description.student.model), "weights": RANDOM}
            ),
        }
    )
    shapes = here.base_shapes
    blank = {o: _blank(shape.channels) for o, shape in shapes.items()}
    student = make_student(here.student, BaseInfo(here.base, shapes, blank, here.seed), here.outputs)
    base = None
    if not student.needs_images:
        weights = load_tensors(read_bytes(place, BASE, description)) if here.bundled else None
        base = build_base(here.base, here.inputs, here.seed, weights)
    exported = ExportedStudent(here, student, base)
    try:
        state = load_tensors(read_bytes(place, STUDENT, description))
    except SafetensorError as error:
        raise CorruptError(str(place / STUDENT), f"holds no tensors ({error})") from None
    kept = {name: value for name, value in exported.state_dict().items() if name.startswith(_BASE_PREFIX)}
    load_strictly(exported, {**state, **kept}, str(place / STUDENT))
    return exported.eval()


def _in(place: Path, model: str | None) -> str | None:
    """A model's name with the path of its Python file made absolute."""
    if model is None or not model.startswith("torch:"):
        return model
    path, _, factory = model.removeprefix("torch:").rpartition(":")
    return f"torch:{(place / path).absolute()}:{factory}" if path.endswith(".py") else model


def _blank(channels: int) -> Statistics:
    """In place of statistics that the weights hold."""
    zeros = np.zeros(channels)
    return Statistics(1, zeros, zeros, np.ones(channels), np.zeros((0, 0)))


def _rgb(image: Image.Image | bytes | Path, how: Decoding) -> Image.Image:
    if isinstance(image, Image.Image):
        found = image_to_rgb(image, how)
    else:
        found = decode_image(image if isinstance(image, bytes) else Path(image).read_bytes(), how)
    if isinstance(found, ImageStatus):
        advice = remedy(reason(found)) or "leave it out"
        raise MismatchError(f"images: expected an image, found one that is {found.name} ({reason(found)}); {advice}")
    return found


def _key(output: str) -> str:
    """A name that a module may have."""
    return output.replace(".", "/")
