"""The parallel student: the very features that an extraction computes, and adapters that start at nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kpu.errors import ConfigError, MismatchError
from kpu.format.statistics import Accumulator, Statistics
from kpu.format.teacher import CodecSpec
from kpu.trust.code import CodeLoader, naming_models
from kpu.trust.list import Trust
from pipeline.sections import TeacherConfig
from pipeline.teachers import build_teacher
from trainer.data.shapes import shape_of
from trainer.sections import StudentConfig
from trainer.students import BaseInfo
from trainer.students.adapters import Beside
from trainer.students.parallel import ParallelStudent

RESNET = f"torch:{Path(__file__).parents[3] / 'examples/cifar_resnet.py'}:resnet20"
MODELS = {"vit": ("timm:test_vit", 64), "resnet": ("timm:test_resnet", 64), "cifar": (RESNET, None)}
BOTH = ("global", "patch")
SEED = 7


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest) -> tuple[BaseInfo, dict[str, torch.Tensor], torch.Tensor]:
    """What the cache knows of a base with random weights, its standardised features of four images, and these."""
    model, size = MODELS[request.param]
    config = TeacherConfig.model_validate(
        {"model": model, "weights": "random", "precision": "fp32", "input": None if size is None else {"size": size}}
    )
    teacher = build_teacher("base", config, seed=SEED)
    pixels = np.random.default_rng(0).integers(0, 256, (4, *teacher.input.size, 3), dtype=np.uint8)
    features = teacher(torch.from_numpy(pixels))
    statistics = {name: measured(x) for name, x in features.items()}
    spec = teacher.spec(CodecSpec())
    base = BaseInfo(spec, {o.name: shape_of(o) for o in spec.outputs}, statistics, SEED)
    cached = {
        name: (
            (x.double() - torch.from_numpy(statistics[name].centre)) / torch.from_numpy(statistics[name].std)
        ).float()
        for name, x in features.items()
    }
    mean, std = torch.tensor(spec.input.mean), torch.tensor(spec.input.std)
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
    return base, cached, images


def measured(x: torch.Tensor) -> Statistics:
    accumulator = Accumulator(x.shape[-1])
    accumulator.update(x.flatten(0, -2).numpy())
    return accumulator.finish(0.05)


def student_of(base: BaseInfo, **options: object) -> ParallelStudent:
    config = StudentConfig(kind="parallel", width=4, **options)  # type: ignore[arg-type]
    return ParallelStudent(config, base, BOTH, CodeLoader(naming_models(Trust(), base.spec.model)))


def test_starts_at_the_cached_features(made: tuple[BaseInfo, dict[str, torch.Tensor], torch.Tensor]) -> None:
    base, cached, images = made
    student = student_of(base).train()
    assert student.input == base.spec.input
    assert student.besides > 1
    for output, z in student({}, images).items():
        assert z.dtype == torch.float32
        assert torch.allclose(z, cached[output], atol=1e-2)
    student.check_against(cached, images, 0.01)


def test_only_adapters_learn(made: tuple[BaseInfo, dict[str, torch.Tensor], torch.Tensor]) -> None:
    base, cached, images = made
    student = student_of(base).train()
    frozen = {n: p.clone() for n, p in student.state_dict().items() if ".adapter." not in n}
    for _ in range(2):
        student.zero_grad()
        sum((z - 1).square().mean() for z in student({}, images).values()).backward()
        sizes = {n: p.grad.abs().max().item() for n, p in student.named_parameters() if p.grad is not None}
        moving = {n for n, size in sizes.items() if size > 0}
        torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1).step()
        assert all(".adapter." in n for n in moving)
        assert sum(n.endswith("gamma") for n in moving) == student.besides
    assert any(n.endswith("down.weight") for n in moving)
    assert all(torch.equal(student.state_dict()[n], before) for n, before in frozen.items())
    with pytest.raises(AssertionError):
        torch.testing.assert_close(student({}, images)["patch"], cached["patch"], atol=1e-2, rtol=0)
    student.check_against(cached, images, 0.01)  # it is the base that is compared, whatever the adapters learned
    assert all(part.active for part in student.modules() if isinstance(part, Beside))


def test_other_features_are_refused(made: tuple[BaseInfo, dict[str, torch.Tensor], torch.Tensor]) -> None:
    base, cached, images = made
    shifted = {name: x.clone() for name, x in cached.items()}
    shifted["patch"][2] += 0.5
    with pytest.raises(MismatchError, match=r"patch: expected .* within 0\.1 .* found 0\.(49|5).* in image 2 "):
        student_of(base).check_against(shifted, images, 0.1)
    with pytest.raises(MismatchError, match=r"nan in image 1"):
        broken = {**cached, "global": cached["global"].clone()}
        broken["global"][1] = torch.nan
        student_of(base).check_against(broken, images, 0.1)


def test_other_weights_are_refused(made: tuple[BaseInfo, dict[str, torch.Tensor], torch.Tensor]) -> None:
    base, cached, images = made
    other = BaseInfo(base.spec, base.shapes, base.statistics, SEED + 1)
    with pytest.raises(MismatchError, match="standard deviations"):
        student_of(other).check_against(cached, images, 0.05)


def test_other_model_is_refused(made: tuple[BaseInfo, dict[str, torch.Tensor], torch.Tensor]) -> None:
    base, _, _ = made
    with pytest.raises(MismatchError, match=r"expected the base's outputs"):
        student_of(base, model="timm:test_efficientnet", weights="random")


def test_unknown_kind_of_model(made: tuple[BaseInfo, dict[str, torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"expected timm:<model> or torch:<file.py>:<factory>, found 'hf:x'"):
        student_of(made[0], model="hf:x")
