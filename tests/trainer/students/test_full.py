"""The full student: any model, brought to the base's channels and grid."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data.config import resolve_model_data_config

from kpu.errors import ConfigError, MismatchError
from kpu.torch.weights import seeded
from kpu.trust.code import CodeLoader, naming_models
from kpu.trust.list import Trust
from trainer.data.shapes import OutputShape
from trainer.objective.losses import resize_map
from trainer.sections import StudentConfig
from trainer.students import BaseInfo, Student, make_student

RESNET = f"torch:{Path(__file__).parents[3] / 'examples/cifar_resnet.py'}:resnet20"
BOTH = ("global", "patch")


def full(model: str, channels: int, side: int, weights: str | None = "random") -> Student:
    shapes = {"global": OutputShape(channels), "patch": OutputShape(channels, (side, side))}
    base = BaseInfo(None, shapes, {})  # type: ignore[arg-type]
    torch.manual_seed(0)
    config = StudentConfig(kind="full", model=model, weights=weights)
    return make_student(config, base, BOTH, CodeLoader(naming_models(Trust(), model)))


@pytest.mark.parametrize(("channels", "side"), [(64, 8), (10, 4)])
def test_reaches_the_base_and_learns_throughout(channels: int, side: int) -> None:
    student = full(RESNET, channels, side)
    assert student.needs_images
    assert student.input is not None
    assert student.input.size == (32, 32)
    found = student({}, torch.randn(2, 3, 32, 32))
    assert {o: tuple(z.shape) for o, z in found.items()} == {"global": (2, channels), "patch": (2, side**2, channels)}
    sum((z - 1).square().mean() for z in found.values()).backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == {
        "model.linear.weight",
        "model.linear.bias",
    }


def test_equal_shapes_pass_as_they_are() -> None:
    student = full(RESNET, 64, 8).eval()
    images = torch.randn(2, 3, 32, 32)
    own = student.model(images)  # type: ignore[operator, union-attr]
    found = student({}, images)
    assert torch.equal(found["global"], own["global"])
    assert torch.equal(found["patch"][:, 1 * 8 + 3], own["patch"][:, :, 1, 3])


def test_map_then_resize() -> None:
    student = full(RESNET, 10, 4).eval()
    images = torch.randn(2, 3, 32, 32)
    own = student.model(images)["patch"].flatten(2).transpose(1, 2)  # type: ignore[operator, union-attr]
    expected = resize_map(student.maps["patch"](own), (8, 8), (4, 4))  # type: ignore[index, operator, union-attr]
    assert torch.allclose(student({}, images)["patch"], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=0).eval()
    torch.save(timm.create_model(name).state_dict() | model.state_dict(), tmp_path / "w.pth")
    student = full(f"timm:{name}", model.num_features, 5, str(tmp_path / "w.pth")).eval()
    own = resolve_model_data_config(model)
    assert student.input is not None
    assert (student.input.size, student.input.mean) == (own["input_size"][1:], own["mean"])
    images = torch.randn(2, *own["input_size"])
    found = student({}, images)
    assert torch.allclose(found["global"], model(images), atol=1e-5)
    assert found["patch"].shape == (2, 25, model.num_features)
    sum((z - 1).square().mean() for z in found.values()).backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


def test_weights_of_another_model(tmp_path: Path) -> None:
    torch.save({"state_dict": {"module.conv1.weight": torch.zeros(1)}}, tmp_path / "w.pth")
    with pytest.raises(
        MismatchError, match=r"student\.weights: .*conv1\.weight: expected shape \[16, 3, 3, 3\], found \[1\]"
    ):
        full(RESNET, 64, 8, str(tmp_path / "w.pth"))


def test_weights_that_are_absent_or_run_code(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"student\.weights: expected .* found none"):
        full(RESNET, 64, 8, str(tmp_path / "absent.pth"))
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(ConfigError, match=r"state_dict \(it holds torch\.\S+Linear besides tensors\); save"):
        full(RESNET, 64, 8, str(tmp_path / "module.pth"))


def test_a_seed_may_have_any_size() -> None:
    with seeded(2**32 + 5):
        drawn = torch.rand(1), np.random.rand()  # noqa: NPY002
    with seeded(2**32 + 5):
        assert (torch.rand(1), np.random.rand()) == drawn  # noqa: NPY002


@pytest.mark.parametrize("model", ["timm:no_such_model", "torch:absent.py:make", f"{RESNET}_not"])
def test_unknown_models(model: str) -> None:
    with pytest.raises(ConfigError, match=r"student\.model: expected a (model|factory)"):
        full(model, 64, 8)
