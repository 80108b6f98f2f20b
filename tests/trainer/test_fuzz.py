"""Whatever a run or an export of a stranger says under honest digests, readers end well or with an error of ours."""

import json
import random
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load, save

from kpu.errors import KpuError
from kpu.util.digests import digest, digest_of
from tests.kpu.reading.test_fuzz import forge as forge_cache
from tests.kpu.reading.test_fuzz import restore
from tests.support.builders import build, tree
from tests.support.hostile import mangle, mangle_bytes
from tests.support.trained import small_run
from trainer import load_student
from trainer.config import validate_config
from trainer.data.corpus import Corpus
from trainer.data.targets import choose_outputs
from trainer.evaluation.compare import compare, plot
from trainer.evaluation.trained import load_trained
from trainer.export.export import export
from trainer.run.checkpoint import load_checkpoint
from trainer.run.config_file import MAY_CHANGE
from trainer.run.runs import RunFolder
from trainer.util.sealed import seal_yaml, to_json


def attempt(call: Callable[[], object]) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except KpuError as error:
        str(error)
        return False
    return True


def read_run(path: Path) -> list[bool]:
    """Every reader of a run."""
    run = RunFolder(path)
    readers: list[Callable[[], object]] = [
        run.config, run.caches, run.sources, run.specs, run.model, run.unchecked, run.metrics, run.summary, run.code,
        lambda: run.write_environment({}), lambda: run.keep_metrics(4), lambda: load_checkpoint(run.checkpoints),
        lambda: load_trained(path), lambda: plot(compare([path]), path.parent / "plot.png"),
        lambda: [each.as_json() for each in compare([path])],
    ]  # fmt: skip
    return [attempt(reader) for reader in readers]


def read_export(path: Path) -> list[bool]:
    return [attempt(lambda: load_student(path)(torch.zeros(1, 8, 8, 3, dtype=torch.uint8)))]


def forge(folder: Path, rng: random.Random) -> str:
    """Change one file, and the digests of it."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".md", ".pt2")]
    path = rng.choice(sorted(file for file in files if file.name != "lock" and "tfevents" not in file.name))
    raw, kind = path.read_bytes(), rng.random()
    if kind < 0.2 or path.suffix == ".pt":
        path.write_bytes(mangle_bytes(raw, rng))
        done = "bytes changed"
    elif path.suffix == ".json":
        document = json.loads(raw)
        done = mangle(document, rng)
        path.write_text(json.dumps(document), errors="surrogatepass")
    elif path.suffix == ".jsonl":
        lines = raw.splitlines()
        place = rng.randrange(len(lines))
        line = json.loads(lines[place])
        done = mangle(line, rng)
        path.write_bytes(b"\n".join([*lines[:place], json.dumps(line).encode(), *lines[place + 1 :], b""]))
    elif path.suffix == ".yaml":
        values = yaml.safe_load(raw)
        done = mangle(values, rng)
        with suppress(ValueError, TypeError, RecursionError, yaml.YAMLError):
            path.write_bytes(seal_yaml(values, MAY_CHANGE))
    else:
        tensors = load(raw)
        name = rng.choice(sorted(tensors))
        values = tensors[name]
        odd = [values.flatten(), values.flatten()[:0], values.to(torch.int8), values.double(), values * torch.nan]
        tensors[name] = rng.choice(odd)
        if kind < 0.4:
            del tensors[name]
        length = int.from_bytes(raw[:8], "little")
        path.write_bytes(save(tensors, json.loads(raw[8 : 8 + length]).get("__metadata__")))
        done = f"tensor {name} changed"
    reseal(folder)
    return f"{path.relative_to(folder)}: {done}"


def reseal(folder: Path) -> None:
    """Recompute the digests in the documents of a run or an export, the innermost first."""
    for seal in folder.glob("checkpoints/*/seal.json"):
        with suppress(*_SENSELESS):
            found = json.loads(seal.read_bytes())
            seal.write_text(json.dumps({name: digest((seal.parent / name).read_bytes()) for name in found}))
    for name in ("sources.json", "summary.json", "config.json"):
        with suppress(*_SENSELESS):
            document = json.loads((folder / name).read_bytes())
            with suppress(*_SENSELESS):
                for file in document["digests"]:
                    document["digests"][file] = digest((folder / file).read_bytes())
            document.pop("digest", None)
            (folder / name).write_text(json.dumps({**document, "digest": digest_of(to_json(document))}))


_SENSELESS = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("exported") / "out").path


def fuzz(original: Path, folder: Path, read: Callable[[Path], object], seed: int, rounds: int) -> None:
    rng = random.Random(seed)
    for _ in range(rounds):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        done = forge(folder, rng)
        try:
            read(folder)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} after: {done}") from error


def test_honest_ones_content_every_reader(run: Path, exported: Path, tmp_path: Path) -> None:
    for original, read in ((run, read_run), (exported, read_export)):
        folder = shutil.copytree(original, tmp_path / original.name)
        reseal(folder)
        assert all(read(folder))


def open_for_training(path: Path) -> None:
    """What `fit` does with a cache before its first step, and the rows of a batch."""
    values = {"caches": [str(path)], "base": "alpha", "teachers": ["alpha", "beta"], "outputs": ["global"]}
    config = validate_config(values, "test")

    def read() -> None:
        corpus = Corpus(config.caches, choose_outputs(config), config.base)
        corpus.validation(0.5)
        corpus.labels()
        corpus.fetch(np.arange(20))

    attempt(read)


def fuzz_caches(folder: Path, seed: int, rounds: int) -> None:
    small, rng = build(folder / "small.kpu"), random.Random(seed)
    original = tree(small.path)
    for _ in range(rounds):
        done = forge_cache(small, rng)
        try:
            open_for_training(small.path)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} after: {done}") from error
        restore(small, original)


def test_forged_caches_are_refused_by_a_training_in_errors_of_ours(tmp_path: Path) -> None:
    fuzz_caches(tmp_path, 0, 20)


def test_forged_runs_end_in_errors_of_ours(run: Path, tmp_path: Path) -> None:
    fuzz(run, tmp_path / "run", read_run, 0, 20)


def test_forged_exports_end_in_errors_of_ours(exported: Path, tmp_path: Path) -> None:
    fuzz(exported, tmp_path / "out", read_export, 0, 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(100, 106))
def test_many_forged_runs_and_exports_end_in_errors_of_ours(
    run: Path, exported: Path, tmp_path: Path, seed: int
) -> None:
    fuzz(run, tmp_path / "run", read_run, seed, 150)
    fuzz(exported, tmp_path / "out", read_export, seed, 150)
    fuzz_caches(tmp_path, seed, 150)
