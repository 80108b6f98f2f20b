"""Heads from the student's features to each teacher's outputs, on the teacher's grid; a frozen projection by PCA.

Letters: B rows, P tokens of the student's map, T of a teacher's, D channels of the student, C of a teacher,
K channels of all teachers side by side.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kpu.errors import MismatchError
from trainer.data.shapes import OutputShape
from trainer.objective.losses import resize_map
from trainer.sections import ProjectorConfig

Shapes = Mapping[str, OutputShape]
F64 = npt.NDArray[np.float64]


class Projector(nn.Sequential):
    """(LayerNorm), Linear, GELU, Linear: [..., channels] to [..., out]."""

    def __init__(self, channels: int, hidden: int, out: int, norm: bool) -> None:
        layers = [nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, out)]
        super().__init__(*([nn.LayerNorm(channels)] if norm else []), *layers)


class Projectors(nn.Module):
    """An independent `Projector` for each output of each teacher.

    Maps are brought to the teacher's grid by a bilinear resize on the side where it is cheaper: before the head
    towards a coarser grid, after it towards a finer one.

    Args:
        student: shapes of the student's features by output.
        teachers: shapes of the targets by teacher and output; each output is one of the student's.
        config: width and norm of the heads.

    Raises:
        MismatchError: a teacher has an output that the student lacks, or one is a map and the other a vector.
    """

    def __init__(self, student: Shapes, teachers: Mapping[str, Shapes], config: ProjectorConfig) -> None:
        super().__init__()
        self._student, self._teachers = dict(student), {name: dict(shapes) for name, shapes in teachers.items()}
        self.heads = nn.ModuleDict()
        for teacher, shapes in self._teachers.items():
            check_outputs(self._student, shapes, teacher, "student")
            for output, shape in shapes.items():
                channels = self._student[output].channels
                head = Projector(channels, config.hidden, shape.channels, config.norm)
                self.heads[slot(teacher, output)] = head

    def forward(self, z: Mapping[str, Tensor], teacher: str) -> dict[str, Tensor]:
        """Predicted targets of `teacher` by output, [B, C] or [B, T, C], from features z, [B, D] or [B, P, D]."""
        predicted = {}
        for output, shape in self._teachers[teacher].items():
            head, own = self.heads[slot(teacher, output)], self._student[output]
            if shape.tokens <= own.tokens:
                predicted[output] = head(onto_grid(z[output], own, shape))
            else:
                predicted[output] = onto_grid(head(z[output]), own, shape)
        return predicted


class PcaProjector(nn.Module):
    """The D leading principal components of K channels, turned onto D of those channels, at unit variance.

    The turn is the orthogonal Procrustes solution (Schoenemann 1966): of all rotations of the component scores the one
    nearest, in squared distance, to the channels `anchor`. Everything is a buffer; nothing here is learned.
    """

    mean: Tensor
    projection: Tensor
    restoration: Tensor

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("projection", torch.zeros(channels, out))
        self.register_buffer("restoration", torch.zeros(out, channels))

    def fit(self, mean_K: F64, covariance_KK: F64, anchor: slice) -> None:
        """Set the projection from moments of the K channels; `anchor` are the D channels to turn onto."""
        _, vectors = np.linalg.eigh(covariance_KK)
        components_KD = vectors[:, ::-1][:, : self.projection.shape[1]]
        left, _, right = np.linalg.svd(components_KD.T @ covariance_KK[:, anchor])
        turned_KD = components_KD @ left @ right
        variance_D = np.einsum("kd,kl,ld->d", turned_KD, covariance_KK, turned_KD, optimize=True)
        std_D = np.sqrt(np.maximum(variance_D, np.finfo(np.float32).eps * variance_D.max()))
        self.mean.copy_(torch.from_numpy(mean_K))
        self.projection.copy_(torch.from_numpy(turned_KD / std_D))
        self.restoration.copy_(torch.from_numpy((turned_KD * std_D).T))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to float32 [..., D] of mean 0 and variance 1."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() - self.mean) @ self.projection

    def restore(self, u: Tensor) -> Tensor:
        """[..., D] to float32 [..., K]: the part of x that the components hold."""
        with torch.autocast(u.device.type, enabled=False):
            return u.float() @ self.restoration + self.mean


def slot(teacher: str, output: str) -> str:
    """Key of a module that belongs to an output of a teacher: torch allows no dots in it, and the cache no colons."""
    return f"{teacher}:{output}".replace(".", "/")


def onto_grid(x: Tensor, shape: OutputShape, to: OutputShape) -> Tensor:
    """`x` of the grid of `shape` on the grid of `to`; a vector as it is."""
    if shape.grid is None or to.grid is None:
        return x
    return resize_map(x, shape.grid, to.grid)


def check_outputs(student: Shapes, teacher: Shapes, name: str, whose: str) -> None:
    """Each output of `teacher` is also one of `student`, both maps or both vectors.

    Raises:
        MismatchError: it does not; `name` is the teacher's name and `whose` says what `student` is.
    """
    for output, shape in teacher.items():
        own = student.get(output)
        if own is None or (own.grid is None) != (shape.grid is None):
            found = "none" if own is None else ("a vector" if own.grid is None else "a map")
            wanted = "a vector" if shape.grid is None else "a map"
            raise MismatchError(
                f"teacher {name!r}, {output}: expected {wanted} {output!r} of the {whose}, found {found}; "
                "leave it out of `outputs`, or choose a student that gives it"
            )
