"""Small things to extract from, and with: noise images, a toy teacher, and the command line run in this process."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from typer.testing import CliRunner, Result

TOY = '''
import torch
from torch import nn


class Toy(nn.Module):
    """A 4 x 4 convolution of stride 4 over 8 x 8 pixels; with `poison`, NaN for an image that is red all over."""

    def __init__(self, width=6, poison=False):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, width, 4, 4)
        self.head = nn.Linear(width, 3)
        self.poison = poison
        self.data_config = {
            "input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0
        }

    def forward(self, images):
        patch = self.convolution(images)
        if self.poison:
            red = (images[:, 0].amin((1, 2)) > 0.99) & (images[:, 1:].amax((1, 2, 3)) < -0.99)
            patch = torch.where(red[:, None, None, None], torch.nan, patch)
        return {"global": patch.mean((2, 3)), "patch": patch}


def toy():
    return Toy()


def wider():
    return Toy(9)


def poisoned():
    return Toy(poison=True)
'''


def write_teacher(folder: Path) -> str:
    """Write the toy teacher; what stands before `:<factory>` in its model."""
    file = folder / "toy.py"
    file.write_text(TOY)
    return f"torch:{file}"


def noise(seed: int, size: tuple[int, int] = (10, 12)) -> Image.Image:
    """An image of `size` (H, W)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def write_images(folder: Path, count: int) -> Path:
    """Write `count` noise images 000.png, 001.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        noise(seed).save(folder / f"{seed:03d}.png")
    return folder


def kpu(*arguments: object) -> Result:
    """Run `kpu-cache` in this process. An error that no message was made of is raised."""
    result = CliRunner().invoke(_app(), [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def kpu_json(*arguments: object) -> Any:
    """What a command prints with `--json`, whatever its exit code."""
    return json.loads(kpu(*arguments, "--json").stdout)


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of change and digest of every file and folder below `folder`, runs and temporaries included."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.name != ".tmp"  # opening a cache for writing makes and removes a probe in it
    }


def assert_refused(result: Result, *fragments: str, code: int = 2) -> None:
    """One message on standard error that says all of `fragments`, and the exit code."""
    assert result.exit_code == code, result.output
    others = ("warning: ", "open: ", "check: ", "read: ", "probe: ")
    errors = [line for line in result.stderr.splitlines() if not line.startswith(others)]
    assert len(errors) == 1, result.stderr
    missing = [fragment for fragment in ("error: ", *fragments) if fragment not in errors[0]]
    assert not missing, errors[0]


def files(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """The part of `snapshot` that begins with one of `names`."""
    return {name: value for name, value in snapshot(folder).items() if name.startswith(tuple(names))}


def _app() -> Any:
    from cli.cache import app

    return app
