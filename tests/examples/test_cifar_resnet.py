"""The CIFAR ResNet of the examples, as a module and as a teacher."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.sections import TeacherConfig
from pipeline.teachers import FrozenTeacher, build_teacher

FILE = Path(__file__).parents[2] / "examples/cifar_resnet.py"


def build(factory: str, weights: str, **options: object) -> FrozenTeacher:
    model = f"torch:{FILE}:{factory}"
    return build_teacher("resnet", TeacherConfig.model_validate({"model": model, "weights": weights, **options}))


@pytest.mark.parametrize(("factory", "parameters"), [("resnet20", 269_722), ("resnet56", 853_018)])
def test_the_sizes_of_the_paper(factory: str, parameters: int) -> None:
    """Table 6 of the paper gives 0.27 and 0.85 million."""
    teacher = build(factory, "random", layers=["layer1", "layer2"])
    assert sum(p.numel() for p in teacher._backbone.module.parameters()) == parameters
    assert [(output.name, output.shape, output.grid) for output in teacher.outputs] == [
        ("global", (64,), None),
        ("patch", (64, 64), (8, 8)),
        ("layer1.patch", (1024, 16), (32, 32)),
        ("layer2.patch", (256, 32), (16, 16)),
    ]


def test_global_is_the_mean_of_the_map() -> None:
    found = build("resnet20", "random")(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8))
    torch.testing.assert_close(found["global"], found["patch"].mean(1))
    assert found["patch"].min() >= 0


@pytest.mark.parametrize(
    ("factory", "file", "classes"),
    [
        ("resnet20", "cifar_resnet/resnet20-12fca82f.th", 10),
        ("resnet56", "cifar_kpu/general.pt", 4),
        ("resnet20", "cifar_kpu/animals.pt", 7),
        ("resnet20", "cifar_kpu/vehicles.pt", 5),
    ],
)
def test_the_weights_decide_the_classes(shared_data: Path, factory: str, file: str, classes: int) -> None:
    teacher = build(factory, str(shared_data / "teachers" / file))
    assert teacher.head is not None
    assert teacher.head[0].shape == (classes, 64)


def accuracy(shared_data: Path, teacher: FrozenTeacher, count: int, batch: int = 200) -> float:
    """Top-1 of the head on the first `count` test images of CIFAR-10, in percent."""
    table = pq.read_table(shared_data / "data/cifar10/test-00000-of-00001.parquet").slice(0, count)
    decoded = [
        np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in table["image"].to_pylist()
    ]
    images = torch.from_numpy(np.stack(decoded))
    features = np.concatenate([teacher(part)["global"].numpy() for part in images.split(batch)])
    assert teacher.head is not None
    weight, bias = teacher.head
    return float(100 * np.mean((features @ weight.T + bias).argmax(1) == table["label"].to_numpy()))


def test_real_weights_name_real_images(shared_data: Path) -> None:
    teacher = build("resnet20", str(shared_data / "teachers/cifar_resnet/resnet20-12fca82f.th"), outputs=["global"])
    assert accuracy(shared_data, teacher, 400) == pytest.approx(81.03, abs=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "file", "expected"),
    [("resnet20", "resnet20-12fca82f.th", 81.03), ("resnet56", "resnet56-4bfd9763.th", 83.20)],
)
def test_the_accuracy_that_was_measured(shared_data: Path, factory: str, file: str, expected: float) -> None:
    teacher = build(factory, str(shared_data / "teachers/cifar_resnet" / file), outputs=["global"])
    assert round(accuracy(shared_data, teacher, 10_000), 2) == expected
