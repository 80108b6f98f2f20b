"""Real images, real teachers, known answers: CIFAR-10 through ResNet-56, whose accuracy was published."""

from pathlib import Path

import numpy as np
import pytest

from cache import open_cache
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
                "outputs": ["global"],
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
def test_resnet56_keeps_its_accuracy(shared_data: Path, tmp_path: Path) -> None:
    lossless = config(shared_data, tmp_path / "fp32.kpu", codec={"name": "fp32"})
    assert extract(validate_config(lossless, "test")).complete
    assert round(top1(tmp_path / "fp32.kpu"), 2) == 83.20

    default = config(shared_data, tmp_path / "uniform.kpu")
    assert extract(validate_config(default, "test")).complete
    assert abs(top1(tmp_path / "uniform.kpu") - 83.20) <= 0.2
