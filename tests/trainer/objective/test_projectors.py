"""Heads: grids, which side the resize is on, and the frozen projection against numpy."""

import numpy as np
import pytest
import torch

from kpu.errors import MismatchError
from trainer.data.shapes import OutputShape
from trainer.objective.losses import resize_map
from trainer.objective.projectors import PcaProjector, Projector, Projectors, slot
from trainer.sections import ProjectorConfig

STUDENT = {"global": OutputShape(6), "patch": OutputShape(6, (4, 4))}
TEACHERS = {
    "dino.v2": {"global": OutputShape(5), "patch": OutputShape(5, (2, 2))},
    "train": {"patch": OutputShape(3, (4, 6))},
    "same": {"patch": OutputShape(4, (4, 4))},
}


def features() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"global": torch.randn(3, 6, generator=generator), "patch": torch.randn(3, 16, 6, generator=generator)}


def test_head_by_hand() -> None:
    head = Projector(2, 1, 1, norm=False)
    with torch.no_grad():
        for parameter, value in zip(head.parameters(), ([[1.0, 2.0]], [0.5], [[3.0]], [-1.0]), strict=True):
            parameter.copy_(torch.tensor(value))
    h = 1 + 2 * 0.25 + 0.5
    gelu = h * 0.9772498680518208  # Phi(2)
    assert head(torch.tensor([1.0, 0.25])).item() == pytest.approx(3 * gelu - 1)


def test_norm_removes_magnitude() -> None:
    x = torch.tensor([[1.0, -2.0, 4.0]])
    with_norm, without = Projector(3, 8, 2, norm=True), Projector(3, 8, 2, norm=False)
    torch.testing.assert_close(with_norm(x), with_norm(10 * x))
    assert not torch.allclose(without(x), without(10 * x))


def test_shapes_are_the_teachers_and_teachers_are_independent() -> None:
    projectors = Projectors(STUDENT, TEACHERS, ProjectorConfig(hidden=8))
    for teacher, outputs in TEACHERS.items():
        predicted = projectors(features(), teacher)
        assert {o: x.shape[1:] for o, x in predicted.items()} == {
            o: (s.channels,) if s.grid is None else (s.tokens, s.channels) for o, s in outputs.items()
        }
    projectors(features(), "train")["patch"].sum().backward()
    touched = {name.split(".")[1] for name, p in projectors.named_parameters() if p.grad is not None}
    assert touched == {slot("train", "patch")}


def test_resize_stands_before_the_head_when_shrinking_and_after_it_when_growing() -> None:
    projectors = Projectors(STUDENT, TEACHERS, ProjectorConfig(hidden=8))
    z = features()
    shrink, grow = projectors.heads["dino/v2:patch"], projectors.heads["train:patch"]
    torch.testing.assert_close(projectors(z, "dino.v2")["patch"], shrink(resize_map(z["patch"], (4, 4), (2, 2))))
    torch.testing.assert_close(projectors(z, "train")["patch"], resize_map(grow(z["patch"]), (4, 4), (4, 6)))
    torch.testing.assert_close(projectors(z, "same")["patch"], projectors.heads["same:patch"](z["patch"]))


def test_an_output_that_the_student_lacks_is_refused() -> None:
    with pytest.raises(MismatchError, match="teacher 'a', patch: expected a map 'patch' of the student, found none"):
        Projectors({"global": OutputShape(6)}, {"a": {"patch": OutputShape(3, (2, 2))}}, ProjectorConfig())
    with pytest.raises(MismatchError, match="expected a vector 'global' of the student, found a map"):
        Projectors({"global": OutputShape(6, (1, 1))}, {"a": {"global": OutputShape(3)}}, ProjectorConfig())


def test_pca_against_numpy() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5000, 7)) @ rng.normal(size=(7, 7)) + 1
    mean, covariance = x.mean(0), np.cov(x.T, bias=True)
    projector = PcaProjector(7, 3)
    projector.fit(mean, covariance, slice(2, 5))
    x_NK = torch.tensor(x, dtype=torch.float32)
    u = projector(x_NK)
    np.testing.assert_allclose(u.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(u.var(0, correction=0), 1, rtol=1e-4)
    # Read back, it is the best approximation of rank 3 (Eckart and Young).
    left, values, right = np.linalg.svd(x - mean, full_matrices=False)
    best = left[:, :3] * values[:3] @ right[:3] + mean
    np.testing.assert_allclose(projector.restore(u), best, atol=1e-3)
    # No other rotation of the scores is nearer to the anchor.
    scores = (x - mean) @ right[:3].T
    deviations = (projector.restoration.double().numpy() ** 2).sum(1) ** 0.5
    turned = u.double().numpy() * deviations
    near = ((turned - (x - mean)[:, 2:5]) ** 2).sum()
    for _ in range(200):
        other = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        assert near <= ((scores @ other - (x - mean)[:, 2:5]) ** 2).sum() * (1 + 1e-5)
