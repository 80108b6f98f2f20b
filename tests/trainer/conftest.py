"""A cache of 70 small images by three toy teachers, and the configuration of a training that takes a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.toys import kpu, write_images, write_teacher
from trainer.config import TrainConfig, validate_config
from trainer.loop import prepare

IMAGES, BROKEN, RED = 70, 7, 20
"""How many images; the row of the one that cannot be decoded; that of the one for which `shy` gives NaN."""

COLLAPSED = "the shared space cannot be learned from"

Extract = Callable[..., Path]
Configure = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images/` and `toy.py`."""
    place = tmp_path_factory.mktemp("toys")
    write_teacher(place)
    images = write_images(place / "images", IMAGES)
    (images / f"{BROKEN:03d}.png").write_bytes(b"not an image")
    Image.new("RGB", (8, 8), (255, 0, 0)).save(images / f"{RED:03d}.png")
    return place


@pytest.fixture(scope="session")
def extract(place: Path) -> Extract:
    """Make `<name>.kpu` by the teachers `name=factory`, with more `--set` options; 32 rows a unit."""

    def make(name: str, *options: str, images: Path | None = None, **teachers: str) -> Path:
        out = place / f"{name}.kpu"
        chosen = [f"--teacher={teacher}=torch:{place}/toy.py:{factory}" for teacher, factory in teachers.items()]
        sets = ["unit_rows=64", "executor.threads=1", "allow_nonfinite=true", *options]
        arguments = [*chosen, *(f"--set={option}" for option in sets)]
        result = kpu("extract", images or place / "images", *arguments, "-o", out)
        assert result.exit_code == 0, result.output
        return out

    return make


@pytest.fixture(scope="session")
def toys(extract: Extract) -> Path:
    """A cache of `general` and `big`, and of `shy`, which gives NaN for one image."""
    return extract("toys", general="toy", big="wider", shy="poisoned")


@pytest.fixture(scope="session")
def configure(toys: Path) -> Configure:
    """A configuration on `toys`, with other values laid over it: `optim={...}` for keys of a section."""

    def make(**changes: Any) -> TrainConfig:
        return validate_config(small_config(toys, **changes), "test")

    return make


@pytest.fixture
def any_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a space pass that has learned for too short."""
    monkeypatch.setattr(prepare, "check_gates", lambda *_: None)


def small_config(cache: Path, **changes: Any) -> dict[str, Any]:
    """Plain values of a small training: 16 rows at a time, two epochs."""
    values: dict[str, Any] = {
        "caches": [str(cache)],
        "base": "general",
        "student": {"width": 8, "depth": 1, "merge": "add"},
        "projector": {"hidden": 8},
        "unify": {"hidden": 8, "steps": 5, "pca_rows": 64},
        "optim": {"epochs": 2, "lr": 0.03},
        "log": {"every": 1, "checkpoint": 2},
        "batch_size": 16,
        "validation": 0.1,
        "device": "cpu",
        "threads": 1,
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return values
