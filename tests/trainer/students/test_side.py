"""The side student: where it starts, what learns first, and what it refuses."""

import pytest
import torch

from kpu.errors import ConfigError
from trainer.data.shapes import OutputShape
from trainer.sections import StudentConfig
from trainer.students import BaseInfo, Student, make_student

SHAPES = {
    "global": OutputShape(5),
    "patch": OutputShape(6, (4, 4)),
    "layer1.patch": OutputShape(3, (8, 8)),
}
BOTH = ("global", "patch")


def base_info(shapes: dict[str, OutputShape] = SHAPES) -> BaseInfo:
    return BaseInfo(None, shapes, {})  # type: ignore[arg-type]


def batch(shapes: dict[str, OutputShape] = SHAPES) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {n: torch.randn(2, *(() if s.grid is None else (s.tokens,)), s.channels) for n, s in shapes.items()}


def side(outputs: tuple[str, ...] = BOTH, **options: object) -> Student:
    torch.manual_seed(0)
    config = StudentConfig(width=16, depth=1, layers=("layer1.patch",), **{"merge": "add", **options})  # type: ignore[arg-type]
    return make_student(config, base_info(), outputs)


def gradients(student: Student, x: dict[str, torch.Tensor]) -> dict[str, float]:
    student.zero_grad()
    sum((z - 1).square().mean() for z in student(x).values()).backward()
    return {n: 0.0 if p.grad is None else float(p.grad.abs().max()) for n, p in student.named_parameters()}


def test_add_starts_exactly_at_the_base() -> None:
    student, x = side(), batch()
    found = student(x)
    assert not student.needs_images
    assert student.shapes == {"global": OutputShape(5), "patch": OutputShape(6, (4, 4))}
    assert list(found) == list(BOTH)
    for output in BOTH:
        assert torch.equal(found[output], x[output])


def test_add_learns_gamma_first_and_the_rest_from_the_second_step() -> None:
    student, x = side(), batch()
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    first = gradients(student, x)
    optimiser.step()
    second = gradients(student, x)
    assert {n for n, size in first.items() if size > 0} == {"gamma.global", "gamma.patch"}
    assert all(size > 0 for size in second.values()), second


def test_concat_keeps_the_base_and_learns_everything_at_once() -> None:
    student, x = side(merge="concat"), batch()
    found = student(x)
    assert student.shapes == {"global": OutputShape(21), "patch": OutputShape(22, (4, 4))}
    assert torch.equal(found["global"][:, :5], x["global"])
    assert torch.equal(found["patch"][..., :6], x["patch"])
    assert found["patch"].shape == (2, 16, 22)
    assert all(size > 0 for size in gradients(student, x).values())


def test_add_is_its_formula() -> None:
    student, x = side(), batch()
    torch.nn.init.constant_(student.gamma["patch"], 0.5)  # type: ignore[index, union-attr, arg-type]
    expected = x["patch"] + 0.5 * student.adapter(x)["patch"]  # type: ignore[operator, union-attr]
    assert torch.allclose(student(x)["patch"], expected)
    assert torch.equal(student(x)["global"], x["global"])


def test_by_default_the_base_is_kept() -> None:
    assert StudentConfig().concat
    assert side(merge="auto").shapes == side(merge="concat").shapes
    for kind, model in (("frozen", None), ("parallel", None), ("full", "timm:x")):
        assert not StudentConfig(kind=kind, model=model).concat  # type: ignore[arg-type]


@pytest.mark.parametrize("outputs", [("global",), ("patch",)])
def test_one_output(outputs: tuple[str, ...]) -> None:
    student = side(outputs)
    assert list(student(batch())) == list(outputs) == list(student.shapes)


def test_vectors_alone() -> None:
    shapes = {"global": OutputShape(5)}
    student = make_student(StudentConfig(width=8, merge="add"), base_info(shapes), ("global",))
    assert not any(isinstance(part, torch.nn.Conv2d) for part in student.modules())
    assert student(batch(shapes))["global"].shape == (2, 5)


def test_learns() -> None:
    student, x = side(), batch()
    target = {o: x[o].flip(0) for o in BOTH}
    optimiser = torch.optim.Adam(student.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = sum((z - target[o]).square().mean() for o, z in student(x).items())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_reduced_precision_keeps_the_base_exact() -> None:
    student, x = side(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = student(x)
    assert found["patch"].dtype == torch.float32
    assert torch.equal(found["patch"], x["patch"])


def test_moves_to_another_type() -> None:
    found = side(merge="concat").to(torch.float64)({name: x.double() for name, x in batch().items()})
    assert found["patch"].dtype == torch.float64


def test_unknown_layer() -> None:
    with pytest.raises(ConfigError, match=r"student\.layers: .*layer1\.patch.*found 'layer1'"):
        make_student(StudentConfig(layers=("layer1",)), base_info(), BOTH)
