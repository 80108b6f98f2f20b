"""Running commands in processes that can be held, interrupted and killed, and judging what they leave behind.

Importing torch takes seconds. A fork server imports everything once, and each command is a fork of it, with a session
of its own: whatever Ray starts for it belongs to that session, also after its parents have died. Linux only.
"""

import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import ClassVar, TypeVar

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples/demo"
PRELOADED = ("cli.cache", "cli.views.show", "cli.views.progress", "pipeline.verify_deep", "pipeline.dry_run",
             "pipeline.extract", "pipeline.executors.inline", "pipeline.executors.ray_actors", "safetensors.torch",
             "cli.train", "cli.views.training", "trainer.loop.fit")  # fmt: skip
PATIENCE = 240.0  # seconds; only a test that fails waits so long
T = TypeVar("T")


@cache
def _context() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _main(program: str, arguments: Sequence[str], variables: Mapping[str, str], folder: str, log: str) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    os.environ.update(variables, PYTHONPATH=str(ROOT))  # Ray's workers, too, import what is tested
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.argv = [program, *arguments]
    import_module(program.replace("kpu-", "cli.")).app()


@dataclass(frozen=True)
class Ended:
    """How a command ended: `code` is minus the signal's number where one killed it."""

    code: int
    output: str


class Command:
    """One `kpu-cache` command, running. `started` are all of them."""

    program: ClassVar = "kpu-cache"
    started: ClassVar[list["Command"]] = []

    def __init__(self, folder: Path, *arguments: object, **variables: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"command-{len(self.started)}.log"
        values = {name: str(value) for name, value in variables.items()}
        self._process = _context().Process(
            target=_main,
            args=(self.program, [str(argument) for argument in arguments], values, str(folder), str(self.log)),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        Command.started.append(self)

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def finish(self, seconds: float = PATIENCE) -> Ended:
        """Wait for the end of the command itself; processes of its session may live on."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            output = self.output
            self.kill_everything()
            raise TimeoutError(f"still running after {seconds} s; it printed:\n{output}")
        return Ended(self._process.exitcode, self.output)

    def says(self, text: str) -> bool:
        """Wait until the command has printed `text`; False where it ended before."""
        return wait_for(lambda: text in self.output or not self.running) and text in self.output

    def signal(self, number: int) -> None:
        """Send a signal to the command itself, as `kill` does."""
        if self.running:
            os.kill(self.pid, number)

    def interrupt(self) -> None:
        """What Ctrl-C does: SIGINT to all of the terminal's foreground processes."""
        if self.running:
            os.killpg(self.pid, signal.SIGINT)

    def kill(self) -> Ended:
        """SIGKILL to the command itself."""
        self.signal(signal.SIGKILL)
        return self.finish()

    def kill_everything(self) -> Ended:
        """SIGKILL to the command and all that it started, until nothing is left."""
        self.signal(signal.SIGKILL)
        kill_session(self.pid)
        self._process.join()
        return Ended(self._process.exitcode or 0, self.output)

    def workers(self) -> list[int]:
        """Process numbers of its Ray actors."""
        return sorted(pid for pid, title in session(self.pid).items() if title.startswith("ray::ActorWorker"))


class Training(Command):
    """One `kpu-train` command, running."""

    program = "kpu-train"


def session(leader: int) -> dict[int, str]:
    """Titles of the living processes of a session by process number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, identity = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(identity) == leader and state not in "ZX":
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def kill_session(leader: int) -> None:
    """SIGKILL to all processes of a session, until nothing is left."""
    while members := session(leader):
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def run(folder: Path, *arguments: object, **variables: object) -> Ended:
    """Run one command to its end."""
    return Command(folder, *arguments, **variables).finish()


def wait_for(condition: Callable[[], T | None], seconds: float = PATIENCE) -> T:
    """Wait until `condition` gives something true, and return that."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s in vain")
        time.sleep(0.01)
    return value


@dataclass(frozen=True)
class Failpoint:
    """An armed failpoint that fires once in all processes together, after each has passed it `skip` times."""

    name: str
    mark: Path
    action: str = "kill"
    skip: int = 0

    @property
    def variables(self) -> dict[str, object]:
        return {
            "KPU_FAILPOINT": self.name,
            "KPU_FAILPOINT_ACTION": self.action,
            "KPU_FAILPOINT_SKIP": self.skip,
            "KPU_FAILPOINT_MARK": self.mark,
        }

    @property
    def pid(self) -> int | None:
        """The process in which it fired; None before."""
        text = self.mark.read_text() if self.mark.exists() else ""
        return int(text) if text else None

    def reached(self, command: Command) -> int | None:
        """Wait until it fires, and return where; None where the command ended without."""
        wait_for(lambda: self.pid or not command.running)
        return self.pid

    def release(self) -> None:
        """Let a held process go on."""
        os.truncate(self.mark, 0)


@dataclass(frozen=True)
class Standing:
    """What a cache holds at one moment.

    `done` are (teacher, unit) with a commit record; `files` identifies the records and what they describe, by inode
    and time of change; `logs` are the run logs.
    """

    done: set[tuple[str, int]] = field(default_factory=set)
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    logs: set[str] = field(default_factory=set)


def standing(path: Path) -> Standing:
    """What `path`, which need not exist yet, holds now."""
    done, files = set(), {}
    for record in sorted(path.glob("*/commits/*.json")) + sorted(path.glob("teachers/*/commits/*.json")):
        folder, unit = record.parents[1], int(record.stem)
        if folder.parent.name == "teachers":
            done.add((folder.name, unit))
        for file in [record, *folder.glob(f"*/c/{unit}/**/*"), *folder.glob(f"*/{unit:06d}.tar")]:
            if file.is_file():
                status = file.stat()
                files[str(file.relative_to(path))] = (status.st_ino, status.st_mtime_ns)
    return Standing(done, files, {log.name for log in path.glob("runs/*.jsonl")})


def logged(path: Path, logs: set[str]) -> list[tuple[str, int]]:
    """(teacher, unit) of every line of the run logs except those named."""
    return [
        (teacher, line["task"]["unit"])
        for log in sorted(path.glob("runs/*.jsonl"))
        if log.name not in logs
        for line in map(json.loads, log.read_text().splitlines())
        for teacher in line["task"]["teachers"]
    ]


def contents(path: Path) -> dict[str, str]:
    """A digest of each file of a cache, and of each folder "", but for `runs/`."""
    return {
        str(item.relative_to(path)): "" if item.is_dir() else hashlib.sha256(item.read_bytes()).hexdigest()
        for item in sorted(path.rglob("*"))
        if item.relative_to(path).parts[0] != "runs"
    }


def differences(path: Path, reference: Mapping[str, str]) -> list[str]:
    """Where a cache differs from `reference`, the contents of another."""
    found = contents(path)
    return sorted(name for name in found.keys() | reference.keys() if found.get(name) != reference.get(name))


def assert_resumed(path: Path, before: Standing, reference: Mapping[str, str], ended: Ended) -> None:
    """The command that ended completed the cache `path`, touched no unit that `before` had, and left nothing over."""
    assert ended.code == 0, ended.output
    assert differences(path, reference) == []
    after = standing(path)
    assert {name: after.files.get(name) for name in before.files} == before.files
    again = logged(path, before.logs)
    assert len(again) == len(set(again))
    assert not before.done & set(again)


def assert_verified(path: Path) -> None:
    """`verify` and `verify --deep` find nothing."""
    ended = run(path.parent, "verify", "--deep", "--rows", 16, path)
    assert ended.code == 0, ended.output


def assert_stopped_clearly(ended: Ended) -> None:
    """Exit code 1 and one message on how to go on."""
    assert ended.code == 1, ended.output
    assert len(re.findall("the same command resumes", ended.output)) == 1, ended.output
    assert "Traceback" not in ended.output
