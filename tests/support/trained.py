"""A labelled cache by toy teachers, and runs on it, each made once a session."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kpu.util.digests import digest_of
from tests.support.toys import kpu, write_teacher
from trainer.config import validate_config
from trainer.loop.fit import fit

CLASSES, EACH = 3, 40
LABELS = {"general": "[null,null,null]", "big": "[0,1,null]"}


def labelled_images(place: Path, seed: int = 0) -> Path:
    """`<class>/<number>.png`: noise around a red, green or blue of the class."""
    folder = place / f"labelled-{seed}"
    if folder.exists():
        return folder
    numbers = np.random.default_rng(seed)
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
        for number in range(EACH):
            pixels = numbers.integers(0, 60, (8, 8, 3))
            pixels[..., label] += 195
            Image.fromarray(pixels.astype(np.uint8)).save(folder / str(label) / f"{number:03d}.png")
    return folder


@cache
def labelled_cache(place: Path, name: str = "labelled", seed: int = 0, teachers: tuple[str, ...] = ("big",)) -> Path:
    """`general` and further teachers over labelled images."""
    write_teacher(place)
    factories = {"general": "toy", "big": "wider"}
    chosen = [f"--teacher={each}=torch:{place}/toy.py:{factories[each]}" for each in ("general", *teachers)]
    sets = [f"--set=teachers.{each}.labels={LABELS[each]}" for each in ("general", *teachers)]
    out = place / f"{name}.kpu"
    more = ["--set=unit_rows=64", "--set=executor.threads=1", "-o", out]
    result = kpu("extract", labelled_images(place, seed), *chosen, *sets, *more)
    assert result.exit_code == 0, result.output
    return out


@cache
def blocks_cache(place: Path) -> Path:
    """`general` alone, a model of three blocks with random weights."""
    out, model = place / "blocks.kpu", Path(__file__).parents[2] / "examples/demo/tiny_cnn.py"
    sets = ["--set=teachers.general.weights=random", "--set=executor.threads=1"]
    result = kpu("extract", labelled_images(place), f"--teacher=general=torch:{model}:specialist", *sets, "-o", out)
    assert result.exit_code == 0, result.output
    return out


@cache
def timm_cache(place: Path, model: str) -> Path:
    """`general` alone, a timm model with random weights on images of 32 pixels, with the map after block or stage 1."""
    out = place / f"{model}.kpu"
    more = {"weights": "random", "input.size": "32", "layers": "[1]"}
    sets = [*(f"--set=teachers.general.{key}={value}" for key, value in more.items()), "--set=executor.threads=1"]
    result = kpu("extract", labelled_images(place), f"--teacher=general=timm:{model}", *sets, "-o", out)
    assert result.exit_code == 0, result.output
    return out


@cache
def small_run(place: Path, name: str = "run", **changes: Any) -> Path:
    """A run of three epochs; `changes` are values of the configuration, a section as a tuple of pairs.

    Its folder is called `name` and, so that no two tests share one by chance, by a digest of the changes.
    """
    values: dict[str, Any] = {
        "caches": [str(labelled_cache(place))],
        "base": "general",
        "student": {"width": 8, "depth": 1, "merge": "add"},
        "projector": {"hidden": 16},
        "optim": {"epochs": 3, "lr": 0.03},
        "log": {"every": 4, "checkpoint": 4},
        "batch_size": 16,
        "validation": 0.25,
        "device": "cpu",
        "threads": 1,
    }
    for key, value in changes.items():
        values[key] = dict(value) if value and isinstance(value[0], tuple) else list(value)
    folder = f"{name}-{digest_of(values)[:8]}" if changes else name
    return fit(validate_config(values, "test"), place / folder).path
