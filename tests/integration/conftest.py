"""A few hundred digits, two tiny teachers, and the cache that an uninterrupted run makes of them."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.integration.harness import DEMO, Command, contents, run

EVERY = 6  # of the 1,797 digits: 300 images, 5 units


@pytest.fixture(autouse=True)
def _nothing_runs_on() -> Iterator[None]:
    """Ends what a test has started: Ray's helpers outlive a killed driver by seconds."""
    yield
    while Command.started:
        Command.started.pop().kill_everything()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images of 8 x 8, and one file that is none."""
    folder = tmp_path_factory.mktemp("images") / "digits"
    spec = importlib.util.spec_from_file_location("write_digits", DEMO / "write_digits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_digits(folder)
    for path in folder.glob("*/*.png"):
        if int(path.stem) % EVERY:
            path.unlink()
    (folder / "5/broken.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="session")
def config(digits: Path) -> Path:
    """A configuration without `out`: give -o."""
    teachers = {
        "general": {
            "model": f"torch:{DEMO}/tiny_cnn.py:general",
            "weights": f"{DEMO}/weights/general.safetensors",
        },
        "low": {
            "model": f"torch:{DEMO}/tiny_cnn.py:specialist",
            "weights": f"{DEMO}/weights/low.safetensors",
            "codec": {"name": "fp16"},
        },
    }
    path = digits.parent / "config.yaml"
    executor = {"threads": 1, "batch_size": 16}
    values = {"data": {"source": str(digits)}, "unit_rows": 64, "teachers": teachers, "executor": executor}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="session")
def finished(config: Path) -> Path:
    """The cache of an uninterrupted run."""
    path = config.parent / "finished.kpu"
    ended = run(config.parent, "extract", "-c", config, "-o", path)
    assert ended.code == 0, ended.output
    return path


@pytest.fixture(scope="session")
def reference(finished: Path) -> dict[str, str]:
    """What every cache of the same configuration must hold in the end."""
    return contents(finished)


@pytest.fixture(scope="session")
def finished_in_tars(config: Path) -> Path:
    """The same in tars."""
    path = config.parent / "tars.kpu"
    ended = run(config.parent, "extract", "-c", config, "-o", path, "--set", "format=webdataset")
    assert ended.code == 0, ended.output
    return path


@pytest.fixture(scope="session")
def calibrated(config: Path, finished: Path) -> Callable[[Path], Path]:
    """Makes a cache whose plan and teachers stand, without any unit: what is left to do is the workers'."""
    del config

    def make(path: Path) -> Path:
        shutil.copytree(finished, path, ignore=_units)
        return path

    return make


def _units(folder: str, names: list[str]) -> list[str]:
    if Path(folder).name == "finished.kpu":
        return ["runs", ".tmp"]
    return [name for name in names if name in ("c", "commits")]
