"""What a GPU must not change: stored features within a grid step, where a resumed training ends, what is exported."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from kpu import open_cache
from tests.integration.harness import Ended, Failpoint, Training, contents, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
FP32 = [f"--set=teachers.{name}.precision=fp32" for name in ("general", "low")]


def done(ended: Ended) -> Ended:
    assert ended.code == 0, ended.output
    return ended


def test_stored_features_are_those_of_the_cpu_within_a_step(config: Path, tmp_path: Path) -> None:
    extract = ["extract", "-c", config, *FP32, "-o"]
    done(run(tmp_path, *extract, tmp_path / "cpu.kpu", **NO_GPU))
    same = f"--set=calibration_from={tmp_path}/cpu.kpu"
    for name in ("one", "two"):
        done(run(tmp_path, *extract, tmp_path / f"{name}.kpu", same))
    assert contents(tmp_path / "one.kpu") == contents(tmp_path / "two.kpu")

    cpu, gpu = open_cache(tmp_path / "cpu.kpu"), open_cache(tmp_path / "one.kpu")
    rows = np.flatnonzero(cpu.valid())
    assert np.array_equal(cpu.valid(), gpu.valid()) and len(rows)
    for output in ("global", "patch"):
        steps = [cache.read_encoded("general", output, rows).values.astype(int) for cache in (cpu, gpu)]
        assert np.abs(steps[0] - steps[1]).max() <= 1
        assert (steps[0] == steps[1]).mean() > 0.99
        exact = [cache.read("low", output, rows) for cache in (cpu, gpu)]
        np.testing.assert_allclose(exact[1], exact[0], rtol=2**-9, atol=2e-3)


@pytest.fixture(scope="module")
def cached(config: Path) -> Path:
    """A cache that a GPU made, by default in bf16."""
    path = config.parent / "gpu.kpu"
    done(run(config.parent, "extract", "-c", config, "-o", path))
    assert open_cache(path).teachers["general"].spec.precision == "bf16"
    return path


@pytest.fixture(scope="module")
def training(cached: Path) -> Path:
    values = {
        "caches": [str(cached)],
        "base": "general",
        "student": {"width": 16, "depth": 1},
        "projector": {"hidden": 16},
        "optim": {"epochs": 4},
        "log": {"every": 2, "checkpoint": 5},
        "batch_size": 32,
        "validation": 0.1,
        "device": "cuda",
    }
    path = cached.parent / "gpu.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_killed_training_goes_on_to_the_same_end(training: Path, tmp_path: Path) -> None:
    whole, broken = (["fit", "-c", training, "-o", tmp_path / name] for name in ("whole", "broken"))
    done(Training(tmp_path, *whole).finish())
    point = Failpoint("train.step", tmp_path / "mark", skip=12)
    assert Training(tmp_path, *broken, **point.variables).finish().code == -signal.SIGKILL
    done(Training(tmp_path, *broken, "--resume").finish())
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "broken")]
    told = [[json.loads(line) for line in each] for each in lines]
    assert [line["step"] for line in told[0]] == [line["step"] for line in told[1]]
    losses = [[line["loss"] for line in each if "loss" in line] for each in told]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)  # sums on a GPU come in any order
    assert losses[0][-1] < 0.8 * losses[0][0]


def test_a_student_is_measured_and_exported(training: Path, tmp_path: Path) -> None:
    done(Training(tmp_path, "fit", "-c", training, "-o", tmp_path / "run").finish())
    ended = done(Training(tmp_path, "eval", tmp_path / "run", "--json").finish())
    scores = json.loads(ended.output[ended.output.index("{") :])
    assert scores["base"]["r2"] > 0.9
    done(Training(tmp_path, "export", tmp_path / "run", "-o", tmp_path / "student").finish())
    assert (tmp_path / "student/student.safetensors").exists()
