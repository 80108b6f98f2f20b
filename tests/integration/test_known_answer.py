"""Real images, real teachers, known answers: CIFAR-10 through ResNet-56, whose accuracy was published."""

from pathlib import Path

import numpy as np
import pytest

from kpu import open_cache
from kpu.tools.status import status
from kpu.tools.verify import verify
from pipeline.config import validate_config
from pipeline.extract import extract

RESNET = Path(__file__).parents[2] / "examples/cifar_resnet.py"


def config(shared_data: Path, out: Path, **changes: object) -> dict[str, object]:
    return {
        "data": {"source": str(shared_data / "data/cifar10/test-00000-of-00001.parquet")},
        "out": str(out),
        "teachers": {
            "resnet56": {
                "model": f"torch:{RESNET}:resnet56",
                "weights": str(shared_data / "teachers/cifar_resnet/resnet56-4bfd9763.th"),
            }
        },
        **changes,
    }


def top1(path: Path) -> float:
    """Accuracy of the cached head on the cached features, in percent."""
    cache = open_cache(path)
    teacher = cache.teachers["resnet56"]
    assert teacher.head is not None
    weight, bias = teacher.head
    features = cache.read("resnet56", "global", np.arange(cache.rows))
    labels = cache.samples.to_table(["label"])["label"].to_numpy()
    return float(100 * np.mean((features @ weight.T + bias).argmax(1) == labels))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_resnet56_keeps_its_accuracy(shared_data: Path, tmp_path: Path) -> None:
    lossless = config(shared_data, tmp_path / "fp32.kpu", codec={"name": "fp32"})
    assert extract(validate_config(lossless, "test")).complete
    assert round(top1(tmp_path / "fp32.kpu"), 2) == 83.20

    default = config(shared_data, tmp_path / "uniform.kpu")
    assert extract(validate_config(default, "test")).complete
    assert abs(top1(tmp_path / "uniform.kpu") - 83.20) <= 0.2

    teacher = status(tmp_path / "uniform.kpu").teachers["resnet56"]
    as_fp16 = 2 * 10_000 * (64 + 64 * 64)
    assert teacher.bytes <= 0.45 * as_fp16
    assert teacher.rmse is not None and teacher.rmse <= 0.0145


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_architectures_share_one_decoding(shared_data: Path, tmp_path: Path) -> None:
    models = {
        "dino": "vit_small_patch14_dinov2",
        "clip": "vit_base_patch16_clip_224.openai",
        "convnext": "convnext_tiny",
    }
    values = {
        "data": {"source": str(shared_data / "data/imagenet-sample/sample-{000000..000003}.tar"), "limit": 64},
        "out": str(tmp_path / "three.kpu"),
        "teachers": {
            name: {"model": f"timm:{model}", "weights": "random", "input": {"size": 224}}
            for name, model in models.items()
        },
        "calibration_rows": 16,
        "executor": {"batch_size": 16},
    }
    assert extract(validate_config(values, "test")).complete
    assert verify(tmp_path / "three.kpu").ok

    cache = open_cache(tmp_path / "three.kpu")
    assert {name: teacher.spec.outputs[1].grid for name, teacher in cache.teachers.items()} == {
        "dino": (16, 16),
        "clip": (14, 14),
        "convnext": (7, 7),
    }
    means = {teacher.spec.input.mean for teacher in cache.teachers.values()}
    assert len(means) == 2  # CLIP's own, and ImageNet's for the others
    for name in models:
        features = cache.read(name, "patch", [0, 63])
        assert np.isfinite(features).all()
        assert np.abs(features[0] - features[1]).max() > 0
