"""The embedded demo: its images, its teachers' weights and its configuration fit together."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform

from pipeline.config import load_config

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples/demo"
FIRST_TEST_IMAGE = 1297


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("digits")
    assert _load("write_digits").write_digits(folder) == 1797
    return sorted(folder.glob("*/*.png"), key=lambda path: path.name)


def test_digits_are_grey_images_in_a_folder_for_each_class(digits: list[Path]) -> None:
    assert len(digits) == 1797
    assert {path.parent.name for path in digits} == set("0123456789")
    with Image.open(digits[0]) as image:
        assert (image.size, image.mode, image.getextrema()) == ((8, 8), "L", (0, 239))


def test_all_weights_together_are_under_a_megabyte() -> None:
    sizes = [path.stat().st_size for path in (DEMO / "weights").iterdir()]
    assert len(sizes) == 3 and sum(sizes) < 2**20


@pytest.mark.parametrize(("name", "labels", "least"), [("low", range(5), 0.97), ("high", range(5, 10), 0.97)])
def test_a_specialist_names_its_digits_of_the_test_images(
    name: str, labels: range, least: float, digits: list[Path]
) -> None:
    model = _load("tiny_cnn").specialist().eval()
    model.load_state_dict(load_file(DEMO / "weights" / f"{name}.safetensors"), strict=True)
    transform = create_transform(**model.data_config)
    test = digits[FIRST_TEST_IMAGE:]
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in test])
    with torch.inference_mode():
        features = model(images)
        answers = model.head(features["global"]).argmax(dim=1)
    assert features["patch"].shape == (500, 48, 4, 4)
    torch.testing.assert_close(features["global"], features["patch"].mean(dim=(2, 3)))
    truth = [int(path.parent.name) for path in test]
    expected = torch.tensor([digit - labels.start if digit in labels else 5 for digit in truth])
    assert (answers == expected).float().mean() > least


def test_the_configuration_is_valid_and_names_files_that_stand() -> None:
    config = load_config(DEMO / "demo.yaml")
    assert list(config.teachers) == ["general", "low", "high"]
    for teacher in config.teachers.values():
        assert teacher.weights is not None and (ROOT / teacher.weights).is_file()
        model = getattr(_load("tiny_cnn"), teacher.model.rpartition(":")[2])()
        model.load_state_dict(load_file(ROOT / teacher.weights), strict=True)
        assert teacher.labels is not None and len(teacher.labels) == model.head.out_features
