"""The Ray executor: the same bytes as inline, whichever of its processes is killed, and whatever lies around."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname
from typing import Any, ClassVar

import pytest
import yaml

from kpu.config.settings import read_yaml
from kpu.errors import IncompleteError
from kpu.util.failpoints import NAMES
from pipeline.config import validate_config
from pipeline.executors import ray_actors
from pipeline.extract import extract
from pipeline.run.observers import Silent
from pipeline.run.reports import UnitReport
from tests.integration.harness import (
    ROOT,
    Command,
    Ended,
    Failpoint,
    Standing,
    assert_resumed,
    assert_verified,
    contents,
    differences,
    kill_session,
    run,
    standing,
    wait_for,
)

DRIVERS_POINTS = frozenset(name for name in NAMES if name.startswith(("plan", "teacher", "run")))
VICTIMS = ("worker", "driver", "everything")
QUICK = {("unit.shards", "worker")}
DRIVERS_OWN_FILES = 6  # that a driver publishes or replaces before the workers begin, where the teachers stand
MOMENTS = 4
UNITS = 10  # five of each of two teachers
TWO_WORKERS = ("--set", "executor.workers=2")
PROBE = '''
import os
import torch
from pathlib import Path
from torch import nn

class Probe(nn.Module):
    """Notes what it sees of its process; kills it over a white image where the file `deadly` stands."""

    data_config = {{"input_size": (3, 8, 8), "mean": (0, 0, 0), "std": (1, 1, 1), "crop_pct": 1.0}}

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 4, 4)

    def forward(self, images):
        folder = Path({folder!r})
        (folder / f"{{os.getpid()}}.threads").write_text(str(torch.get_num_threads()))
        if (folder / "deadly").exists() and (images.amin((1, 2, 3)) > 0.99).any():
            os.kill(os.getpid(), 9)
        patch = self.convolution(images)
        return {{"global": patch.mean((2, 3)), "patch": patch}}
'''

OTHER = """
import sys
import time
import ray


@ray.remote(num_cpus=1)
class Holder:
    def ping(self):
        return None


ray.init(address=sys.argv[1], log_to_driver=False)
holder = Holder.remote()
ray.get(holder.ping.remote())
print("holds", flush=True)
time.sleep(600)
"""

Make = Callable[[Path], Path]


def start(folder: Path, config: Path, out: Path, *options: str, **variables: object) -> Command:
    """Extract with Ray; one worker starts faster than two."""
    ray = ("--executor", "ray", "--set", "executor.workers=1", *options)
    return Command(folder, "extract", "-c", config, "-o", out, *ray, **variables)


@pytest.fixture
def fragile(digits: Path, tmp_path: Path) -> Path:
    """The configuration of a teacher that kills its worker over one image, once `tmp_path / "deadly"` stands."""
    images = tmp_path / "images"
    for path in sorted(digits.glob("*/*.png"))[:250]:
        (images / path.parent.name).mkdir(parents=True, exist_ok=True)
        (images / path.parent.name / path.name).symlink_to(path)
    from PIL import Image

    Image.new("L", (8, 8), 255).save(images / "3/white.png")
    (tmp_path / "probe.py").write_text(PROBE.format(folder=str(tmp_path)))
    config = tmp_path / "fragile.yaml"
    teacher = {"model": f"torch:{tmp_path}/probe.py:Probe", "weights": "random"}
    values: dict[str, Any] = {"data": {"source": str(images)}, "unit_rows": 64, "teachers": {"probe": teacher}}
    config.write_text(yaml.safe_dump({**values, "executor": {"threads": 1, "batch_size": 16}}))
    return config


@contextmanager
def ray_node(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A node of a cluster, with the address that it says, and its process, which leads a session."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    folder.mkdir()
    arguments = [str(Path(sys.executable).parent / "ray"), "start", *options, "--block"]
    log = folder / "ray.log"
    with log.open("wb") as stream:
        node = subprocess.Popen(arguments, stdout=stream, stderr=stream, env=environment, start_new_session=True)
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text())
        said = re.search("--address='([^']+)'", log.read_text())
        yield said.group(1) if said else "", node
    finally:
        node.terminate()
        node.wait()


def test_the_same_bytes_as_inline_from_a_folder_full_of_traps(
    config: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    """The installed command is run where Python files have the names of our packages."""
    command = Path(sys.executable).parent / "kpu-cache"
    if not command.exists():
        pytest.skip(f"kpu is not installed: there is no {command}")
    traps = tmp_path / "traps"
    traps.mkdir()
    for name in ("cache", "pipeline", "cli", "trainer", "torch", "numpy"):
        (traps / f"{name}.py").write_text("raise SystemExit('the wrong module was imported')")
    arguments = [str(command), "extract", "-c", str(config), "-o", "../my.kpu", "--executor", "ray"]
    done = subprocess.run(arguments, cwd=traps, capture_output=True, text=True, check=False)
    ended = Ended(done.returncode, done.stdout + done.stderr)
    assert_resumed(tmp_path / "my.kpu", Standing(), reference, ended)
    assert_verified(tmp_path / "my.kpu")


@pytest.mark.parametrize(
    ("name", "victim"),
    [
        pytest.param(name, victim, marks=() if (name, victim) in QUICK else pytest.mark.slow)
        for name in NAMES
        for victim in VICTIMS
    ],
)
def test_killed_at_a_step(
    name: str, victim: str, config: Path, reference: dict[str, str], calibrated: Make, tmp_path: Path
) -> None:
    """A killed worker is replaced and the run goes on; after anything else, the same command does."""
    out = tmp_path / "my.kpu"
    if name not in DRIVERS_POINTS:
        calibrated(out)
    skip = DRIVERS_OWN_FILES if name.startswith("publish") else 0
    point = Failpoint(name, tmp_path / "mark", "hold", skip)
    command = start(tmp_path, config, out, **point.variables)
    pid = point.reached(command)
    assert pid, command.output
    assert (pid == command.pid) == (name in DRIVERS_POINTS)
    before = Standing()
    if victim == "worker":
        os.kill(wait_for(command.workers)[0] if pid == command.pid else pid, signal.SIGKILL)
        point.release()
        ended = command.finish()
    else:
        command.kill() if victim == "driver" else command.kill_everything()
        before = standing(out)
        ended = start(tmp_path, config, out).finish()
    assert_resumed(out, before, reference, ended)
    assert_verified(out)
    wait_for(lambda: not command.workers())


@pytest.mark.slow
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_killed_at_a_random_moment(
    moment: int, victim: str, config: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "my.kpu"
    command = start(tmp_path, config, out, *TWO_WORKERS)
    choice = random.Random(f"{moment} {victim}")
    if moment:  # the first moment is anywhere in the start-up
        assert command.says("plan:"), command.output
    time.sleep(choice.uniform(0, 2 if moment else 10))
    before = Standing()
    if victim == "worker":
        if workers := command.workers():
            os.kill(choice.choice(workers), signal.SIGKILL)
        ended = command.finish()
    else:
        command.kill() if victim == "driver" else command.kill_everything()
        before = standing(out)
        ended = start(tmp_path, config, out).finish()
    assert_resumed(out, before, reference, ended)
    assert_verified(out)


@pytest.mark.slow
def test_all_workers_killed_at_once(config: Path, reference: dict[str, str], calibrated: Make, tmp_path: Path) -> None:
    out = calibrated(tmp_path / "my.kpu")
    point = Failpoint("unit.shards", tmp_path / "mark", "hold")
    command = start(tmp_path, config, out, *TWO_WORKERS, **point.variables)
    assert point.reached(command)
    for pid in command.workers():
        os.kill(pid, signal.SIGKILL)
    assert_resumed(out, Standing(), reference, command.finish())


@pytest.mark.slow
def test_workers_that_cannot_stay_alive_end_the_run(config: Path, reference: dict[str, str], tmp_path: Path) -> None:
    """As a machine does whose memory does not hold the teachers."""
    out = tmp_path / "my.kpu"
    command = start(tmp_path, config, out)
    killed: set[int] = set()
    while command.running:
        for pid in set(command.workers()) - killed:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    ended = command.finish()
    assert ended.code == 1, ended.output
    assert "a Ray worker died 2 times while it loaded or calibrated the teachers" in ended.output
    assert "Traceback" not in ended.output
    assert_resumed(out, Standing(), reference, start(tmp_path, config, out).finish())


@pytest.mark.slow
def test_a_unit_that_kills_its_workers_is_reported_and_tried_again(fragile: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.kpu", tmp_path / "my.kpu"
    assert run(tmp_path, "extract", "-c", fragile, "-o", whole).code == 0
    point = Failpoint("teacher.published", tmp_path / "mark")
    assert run(tmp_path, "extract", "-c", fragile, "-o", out, **point.variables).code == -signal.SIGKILL

    (tmp_path / "deadly").touch()
    ended = start(tmp_path, fragile, out).finish()
    assert ended.code == 1, ended.output
    assert "Traceback" not in ended.output
    status = json.loads(run(tmp_path, "status", "--json", out).output)
    assert [(failure["teacher"], failure["unit"]) for failure in status["failed"]] == [(None, 1)]
    assert "its worker died 2 times while it held this unit" in status["failed"][0]["reason"]
    before = standing(out)
    assert before.done == {("probe", 0), ("probe", 2), ("probe", 3)}

    (tmp_path / "deadly").unlink()
    ended = run(tmp_path, "retry-failed", out)
    assert_resumed(out, before, contents(whole), ended)
    assert json.loads(run(tmp_path, "status", "--json", out).output)["failed"] == []


@pytest.mark.slow
def test_torch_has_the_planned_threads_in_every_executor(fragile: Path, tmp_path: Path) -> None:
    """Whatever the environment says: other counts give other bits."""
    assert run(tmp_path, "extract", "-c", fragile, "-o", tmp_path / "inline.kpu", OMP_NUM_THREADS=3).code == 0
    command = start(tmp_path, fragile, tmp_path / "ray.kpu", OMP_NUM_THREADS=2)
    assert command.finish().code == 0
    assert {path.read_text() for path in tmp_path.glob("*.threads")} == {"1"}
    assert differences(tmp_path / "ray.kpu", contents(tmp_path / "inline.kpu")) == []


@pytest.mark.slow
def test_what_a_worker_refuses_is_said_as_inline(config: Path, tmp_path: Path) -> None:
    wrong = f"teachers.general.weights={ROOT}/examples/demo/weights/low.safetensors"
    arguments = ["extract", "-c", config, "-o", tmp_path / "my.kpu", "--set", wrong]
    inline, ray = run(tmp_path, *arguments), run(tmp_path, *arguments, "--executor", "ray")
    assert f" (on {gethostname()})" in ray.output
    assert (ray.code, ray.output.replace(f" (on {gethostname()})", "")) == (2, inline.output)
    assert "does not fit" in ray.output


@pytest.mark.slow
def test_no_cluster_and_no_room_are_wrong_configurations(config: Path, tmp_path: Path) -> None:
    ended = run(tmp_path, "extract", "-c", config, "-o", tmp_path / "my.kpu", "--ray-address", "127.0.0.1:1",
                "--executor", "ray")  # fmt: skip
    assert (ended.code, "Traceback" in ended.output) == (2, False), ended.output
    assert "executor.address: cannot reach a Ray cluster at '127.0.0.1:1'" in ended.output
    ended = run(tmp_path, "extract", "-c", config, "-o", tmp_path / "my.kpu", "--executor", "ray",
                "--set", "executor.workers=99")  # fmt: skip
    assert (ended.code, "Traceback" in ended.output) == (2, False), ended.output
    assert "executor.workers: expected room for 99 workers of 1 CPU threads" in ended.output


@pytest.mark.slow
def test_workers_that_ray_kills_for_their_memory_end_the_run(config: Path, tmp_path: Path) -> None:
    """Its monitor kills before the memory is full, and says so by an error of its own."""
    ended = start(tmp_path, config, tmp_path / "my.kpu", RAY_memory_usage_threshold=0.001).finish()
    assert ended.code == 1, ended.output
    assert "a Ray worker died 2 times while it loaded or calibrated the teachers" in ended.output
    assert "use fewer workers or a smaller executor.batch_size" in ended.output
    assert "Traceback" not in ended.output


class Reporter(Silent):
    """Calls `once` after the first unit, and keeps warnings."""

    def __init__(self, once: Callable[[], object]) -> None:
        self.once: Callable[[], object] | None = once
        self.warnings: list[str] = []

    def report(self, report: UnitReport) -> None:  # noqa: ARG002
        if self.once is not None:
            self.once()
        self.once = None

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.mark.slow
def test_a_cluster_that_loses_its_nodes_ends_the_run(
    config: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would wait for ever, and say nothing."""
    monkeypatch.setattr(ray_actors, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(ray_actors, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    out = tmp_path / "my.kpu"
    with ray_node(tmp_path / "head", "--head", "--include-dashboard=false", "--port=0", "--num-cpus=0") as (address, _):
        with ray_node(tmp_path / "node", f"--address={address}", "--num-cpus=1") as (_, node):
            values = {**read_yaml(config), "out": str(out)}
            values["executor"] |= {"kind": "ray", "address": address}
            reporter = Reporter(lambda: kill_session(node.pid))
            with pytest.raises(IncompleteError, match="no node of the cluster has had room for a worker of 1 CPU thr"):
                extract(validate_config(values, "the test"), reporter)
        assert "no node of the cluster has room" in reporter.warnings[-1]
    before = standing(out)
    assert 0 < len(before.done) < UNITS
    assert_resumed(out, before, reference, run(tmp_path, "extract", "-c", config, "-o", out))


@pytest.mark.slow
def test_a_cluster_that_runs_already(config: Path, reference: dict[str, str], tmp_path: Path) -> None:
    """The driver only joins it, so its workers know nothing of the driver's environment or folder."""
    with ray_node(tmp_path / "head", "--head", "--include-dashboard=false", "--port=0", "--num-cpus=2") as (address, _):
        out = tmp_path / "my.kpu"
        ended = run(tmp_path, "extract", "-c", config, "-o", out, "--ray-address", address, "--executor", "ray")
        assert_resumed(out, Standing(), reference, ended)


@pytest.mark.slow
def test_a_cluster_that_others_hold_is_told_and_waited_for(
    config: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_actors, "LOOK_SECONDS", 1.0)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    out = tmp_path / "my.kpu"
    with ray_node(tmp_path / "head", "--head", "--include-dashboard=false", "--port=0", "--num-cpus=1") as (address, _):
        arguments = [sys.executable, "-c", OTHER, address]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None and other.stdout.readline() == "holds\n"

            class Patient(Silent):
                warnings: ClassVar[list[str]] = []

                def warn(self, message: str) -> None:
                    if "held by others" in message:
                        self.warnings.append(message)
                        other.terminate()

            values = {**read_yaml(config), "out": str(out)}
            values["executor"] |= {"kind": "ray", "address": address}
            try:
                summary = extract(validate_config(values, "the test"), Patient())
            finally:
                other.kill()
    assert summary.complete
    assert differences(out, reference) == []
    (warning,) = Patient.warnings
    assert "found 1 CPUs and 0 GPUs of the cluster" in warning
