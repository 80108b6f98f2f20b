"""`kpu-train fit` from end to end: killed and resumed, stopped, starved of disk, misused, and in several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from kpu.util.digests import seal_document
from tests.integration.harness import DEMO, ROOT, Ended, Failpoint, Training, run
from tests.support.toys import assert_refused, snapshot

SPEED = ("rows_per_second", "data_wait")
KILLED = -signal.SIGKILL


def train(folder: Path, *arguments: object, **variables: object) -> Ended:
    return Training(folder, *arguments, **variables).finish()


def told(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without what the clock says."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEED} for line in lines]


def assert_ended_as(path: Path, reference: Path, ended: Ended) -> None:
    """The run was resumed to the very same end as `reference`, and nothing is left over."""
    assert ended.code == 0, ended.output
    assert told(path) == told(reference)
    assert (path / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    checkpoints = [sorted(item.name for item in (each / "checkpoints").iterdir()) for each in (path, reference)]
    assert checkpoints[0] == checkpoints[1]
    assert not [item.name for item in path.iterdir() if item.name.startswith(".")]


@pytest.fixture(scope="session")
def settings(finished: Path) -> Path:
    """A training of 18 steps on the cache of digits, a checkpoint every 3."""
    values = {
        "caches": [str(finished)],
        "base": "general",
        "student": {"width": 8, "depth": 1},
        "projector": {"hidden": 8},
        "optim": {"epochs": 2, "ema": 100.0},
        "log": {"every": 2, "checkpoint": 3},
        "balance": {"name": "dropping"},
        "batch_size": 32,
        "validation": 0.05,
        "device": "cpu",
        "threads": 1,
    }
    path = finished.parent / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="session")
def trained(settings: Path) -> Path:
    """A run that nothing interrupted."""
    out = settings.parent / "trained"
    ended = train(settings.parent, "fit", "-c", settings, "-o", out)
    assert ended.code == 0, ended.output
    assert "kept in" in ended.output
    return out


POINTS = [
    ("train.step", 0),
    ("train.step", 3),
    ("train.step", 10),
    ("train.checkpoint", 0),
    ("train.checkpoint", 2),
    ("train.checkpointed", 0),
    ("train.checkpointed", 3),
]
QUICK = {("train.step", 10), ("train.checkpoint", 2), ("train.checkpointed", 3)}


@pytest.mark.parametrize(
    ("name", "skip"), [pytest.param(*p, marks=() if p in QUICK else pytest.mark.slow) for p in POINTS]
)
def test_killed_at_a_step_and_resumed(name: str, skip: int, settings: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    point = Failpoint(name, tmp_path / "mark", skip=skip)
    assert train(tmp_path, "fit", "-c", settings, "-o", out, **point.variables).code == KILLED
    assert not (out / "model.safetensors").exists()
    again = ["fit", "-c", settings, "-o", out, "--resume", "--set", f"loader.threads={1 + skip % 3}"]
    assert_ended_as(out, trained, train(tmp_path, *again))


@pytest.mark.slow
def test_killed_again_and_again(settings: Path, trained: Path, tmp_path: Path) -> None:
    out, command = tmp_path / "run", ["fit", "-c", settings, "-o", tmp_path / "run"]
    for life in range(4):
        point = Failpoint("train.step", tmp_path / f"mark-{life}", skip=4)
        ended = train(tmp_path, *command, *(["--resume"] if life else []), **point.variables)
        assert ended.code == KILLED, ended.output
    assert_ended_as(out, trained, train(tmp_path, *command, "--resume"))


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("name", ["train.step", pytest.param("train.checkpoint", marks=pytest.mark.slow)])
def test_told_to_stop(name: str, how: str, settings: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    point = Failpoint(name, tmp_path / "mark", "hold", 2)
    command = Training(tmp_path, "fit", "-c", settings, "-o", out, **point.variables)
    assert point.reached(command), command.output
    command.interrupt() if how == "Ctrl-C" else command.signal(signal.SIGTERM)
    ended = command.finish()
    assert ended.code == 1, ended.output
    advice = "begins from the start" if name == "train.step" else "goes on"  # the first checkpoint comes after 3 steps
    assert ended.output.count(f"the same command with --resume {advice}") == 1
    assert "Traceback" not in ended.output
    assert_ended_as(out, trained, train(tmp_path, "fit", "-c", settings, "-o", out, "--resume"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small disk takes root's rights")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("name", ["train.checkpoint", pytest.param("train.step", marks=pytest.mark.slow)])
def test_a_full_disk_keeps_the_last_checkpoint(
    name: str, settings: Path, trained: Path, small_disk: Path, tmp_path: Path
) -> None:
    out, filler = small_disk / "run", small_disk / "filler"
    point = Failpoint(name, tmp_path / "mark", "hold", skip=1 if name == "train.checkpoint" else 3)
    command = Training(tmp_path, "fit", "-c", settings, "-o", out, **point.variables)
    assert point.reached(command), command.output
    status = os.statvfs(small_disk)
    filler.write_bytes(bytes(status.f_bavail * status.f_frsize))
    point.release()
    ended = command.finish()
    assert ended.code == 1, ended.output
    assert "Traceback" not in ended.output
    assert ended.output.count("error:") == 1
    assert "No space left on device; free some space and give the same command again" in ended.output
    assert [path.name for path in (out / "checkpoints").glob("[!.]*")] == ["step-000000003"]
    filler.unlink()
    assert_ended_as(out, trained, train(tmp_path, "fit", "-c", settings, "-o", out, "--resume"))


SPY = """
import json, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
report, *sys.argv[1:] = sys.argv[1:]
from cli.train import app
try:
    app()
finally:
    packages = sorted({name.partition(".")[0] for name in sys.modules} & {"pipeline", "ray", "transformers"})
    json.dump({"packages": packages, "opened": opened}, open(report, "w"))
"""


def test_neither_teachers_nor_images_nor_ray_are_needed(config: Path, digits: Path, tmp_path: Path) -> None:
    """The training reads nothing below the folder of the teachers, which is gone, as are the images."""
    teachers, images = tmp_path / "teachers", tmp_path / "images"
    shutil.copytree(DEMO, teachers)
    shutil.copytree(digits, images)
    text = config.read_text().replace(str(DEMO), str(teachers)).replace(str(digits), str(images))
    (tmp_path / "extract.yaml").write_text(text)
    cache, report = tmp_path / "my.kpu", tmp_path / "report.json"
    assert run(tmp_path, "extract", "-c", tmp_path / "extract.yaml", "-o", cache).code == 0
    shutil.rmtree(teachers)
    shutil.rmtree(images)
    small = [
        "student.width=8",
        "student.depth=1",
        "projector.hidden=8",
        "batch_size=64",
        "base=general",
        "optim.epochs=2",
        "device=cpu",
    ]
    arguments = ["fit", "--cache", cache, "-o", tmp_path / "run", *(f"--set={value}" for value in small)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    spied = [sys.executable, "-c", SPY, str(report), *map(str, arguments)]
    done = subprocess.run(spied, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(report.read_text())
    assert found["packages"] == []
    assert [
        name for name in found["opened"] if str(tmp_path / "run") in name
    ]  # a cache is opened by calls that leave no event
    assert [name for name in found["opened"] if name.startswith((str(teachers), str(images), str(DEMO)))] == []


# --- misuse: one message, exit code 2, nothing made or changed ---


def fit_here(*arguments: object) -> Any:
    from cli.train import app

    former = signal.getsignal(signal.SIGTERM)
    try:
        result = CliRunner().invoke(app, ["fit", *map(str, arguments)])
    finally:
        signal.signal(signal.SIGTERM, former)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["teachers=[general, missing]"], ["teachers", "'missing'", "low"]),
        (["base=missing"], ["base", "missing", "general"]),
        (["teachers=[low]"], ["expected the base 'general'"]),
        (["outputs=[global, depth]"], ["outputs: expected a list of global and patch", "'depth'"]),
        (["student.layers=[layer9.patch]"], ["'general'", "layer9.patch"]),
        (["targets.normalize=phi-s"], ["phi-s", "expected statistics over at least 640 vectors", "found 300"]),
        (["student.widht=3"], ["student.widht", "width"]),
        (["batch_size=100000"], ["batch_size", "expected at most"]),
        (["unify.mode=pretrained", "unify.steps=1", "unify.lowest_reconstruction=0.99"], ["reconstruction", "pca"]),
        (["optim.lr=1e30", "optim.clip=0"], ["expected a finite loss", "optim.lr"]),
        (["student.kind=full", "student.model=timm:no_such_model"], ["student.model", "no_such_model"]),
        (["student.kind=parallel", "images.root=/nowhere"], ["images.root", "/nowhere"]),
    ],
)
def test_bad_values(settings: Path, tmp_path: Path, overrides: list[str], fragments: list[str]) -> None:
    out = tmp_path / "run"
    result = fit_here("-c", settings, "-o", out, *(f"--set={value}" for value in overrides))
    assert_refused(result, *fragments)
    assert not (out / "model.safetensors").exists()
    if "optim" not in overrides[0] and "unify" not in overrides[0]:
        assert not out.exists()


def test_an_incomplete_cache(settings: Path, calibrated: Any, tmp_path: Path) -> None:
    cache = calibrated(tmp_path / "half.kpu")
    result = fit_here("-c", settings, "--cache", cache, "-o", tmp_path / "run")
    assert_refused(result, "'general'", "expected all 5 units, found 0", "kpu-cache extract")
    assert not (tmp_path / "run").exists()


def test_a_cache_of_another_version_and_what_is_no_cache(settings: Path, finished: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(finished, tmp_path / "new.kpu")
    plan = json.loads((cache / "plan.json").read_bytes())
    del plan["digest"]
    (cache / "plan.json").write_bytes(seal_document({**plan, "version": 9}))
    for path, fragment in ((cache, "version 9"), (tmp_path / "nothing", "nothing"), (settings, "train.yaml")):
        result = fit_here("-c", settings, "--cache", path, "-o", tmp_path / "run")
        assert_refused(result, fragment)
    assert not (tmp_path / "run").exists()


def test_a_damaged_cache(settings: Path, finished: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(finished, tmp_path / "bad.kpu")
    for shard in cache.glob("teachers/low/patch/c/*/0/0"):
        data = bytearray(shard.read_bytes())
        data[len(data) // 3] ^= 255
        shard.write_bytes(data)
    result = fit_here("-c", settings, "--cache", cache, "-o", tmp_path / "run")
    assert_refused(result, "teachers/low/patch", code=1)


def test_a_run_that_stands_is_not_touched(settings: Path, trained: Path, tmp_path: Path) -> None:
    before = snapshot(trained)
    assert_refused(fit_here("-c", settings, "-o", trained), "a run exists there", "--resume")
    other = fit_here("-c", settings, "-o", trained, "--resume", "--set", "seed=3", "--set", "optim.lr=1")
    assert_refused(other, "seed: begun with 0, now 3", "start a new run")
    missing = fit_here("-c", settings, "-o", tmp_path / "run", "--resume")
    assert_refused(missing, "expected a run of kpu-train")
    assert snapshot(trained) == before


# --- students on images ---


@pytest.mark.slow
def test_a_parallel_student_must_compute_the_cached_base(settings: Path, tmp_path: Path) -> None:
    command = ["-c", settings, "--set", "student.kind=parallel", "--set", "optim.epochs=1"]
    right = fit_here(*command, "-o", tmp_path / "right")
    assert right.exit_code == 0, right.output
    wrong = fit_here(*command, "-o", tmp_path / "wrong", "--set", "student.weights=random")
    assert_refused(wrong, "expected the base's cached features within", "give the base's model and weights")
    assert not (tmp_path / "wrong").exists()


# --- several processes ---

ROUNDING = 1e-4


def close(a: Any, b: Any) -> bool:
    """Equal but for the rounding of float32, numbers apart from which all must be equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= ROUNDING * (1 + abs(a))
    return bool(a == b)


def assert_agrees(path: Path, reference: Path) -> None:
    differing = [(a, b) for a, b in zip(told(path), told(reference), strict=True) if not close(a, b)]
    assert differing == []


@pytest.fixture(scope="session")
def patchy(config: Path, digits: Path) -> Path:
    """A cache with every third image broken: processes that share a batch have different numbers of rows that count."""
    images, cache = digits.parent / "patchy", digits.parent / "patchy.kpu"
    shutil.copytree(digits, images)
    for path in sorted(images.glob("*/*.png"))[::3]:
        path.write_bytes(b"not an image")
    ended = run(digits.parent, "extract", images, "-c", config, "-o", cache)
    assert ended.code == 0, ended.output
    return cache


LENIENT = ["unify.lowest_reconstruction=-9", "unify.lowest_rank=0"]
MODES = {
    "plain": [],
    "pretrained": ["unify.mode=pretrained", "unify.steps=30", "optim.epochs=1", "log.checkpoint=100", *LENIENT],
    "joint": [
        "unify.mode=joint",
        "student.merge=add",
        "preserve.weight=1.0",
        "optim.lr=0.01",
        "log.checkpoint=100",
        *LENIENT,
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_by_torchrun(mode: str, settings: Path, patchy: Path, tmp_path: Path) -> None:
    chosen = ["--cache", str(patchy), *(f"--set={value}" for value in MODES[mode])]
    one = train(tmp_path, "fit", "-c", settings, "-o", tmp_path / "one", *chosen)
    assert one.code == 0, one.output
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "cli.train"]
    arguments = ["fit", "-c", str(settings), "-o", str(tmp_path / "two"), "--workers", "2", *chosen]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kept in") == 1
    assert_agrees(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_processes_of_ray_are_told_to_stop(how: str, settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    point = Failpoint("train.step", tmp_path / "mark", "hold", skip=7)
    command = Training(tmp_path, "fit", "-c", settings, "-o", out, "--workers", 2, **point.variables)
    assert point.reached(command), command.output
    command.interrupt() if how == "Ctrl-C" else command.signal(signal.SIGTERM)
    ended = command.finish()
    assert ended.code == 1, ended.output
    assert ended.output.count("the same command with --resume goes on") == 1
    assert "Traceback" not in ended.output
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000000003", "step-000000006"]


@pytest.mark.slow
def test_two_processes_by_ray_and_one_process_goes_on(settings: Path, tmp_path: Path) -> None:
    one = train(tmp_path, "fit", "-c", settings, "-o", tmp_path / "one")
    assert one.code == 0, one.output
    out = tmp_path / "two"
    point = Failpoint("train.step", tmp_path / "mark", skip=7)
    died = train(tmp_path, "fit", "-c", settings, "-o", out, "--workers", 2, **point.variables)
    assert died.code == 1, died.output
    assert "Traceback" not in died.output
    assert died.output.count("error:") == 1
    two = train(tmp_path, "fit", "-c", settings, "-o", out, "--workers", 2, "--resume")
    assert two.code == 0, two.output
    assert "kept in" in two.output
    assert_agrees(out, tmp_path / "one")
    refused = train(tmp_path, "fit", "-c", settings, "-o", out, "--workers", 2)
    assert refused.code == 2, refused.output
    assert refused.output.count("a run exists there") == 1
    assert "Traceback" not in refused.output
