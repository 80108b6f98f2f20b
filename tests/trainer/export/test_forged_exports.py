"""An export that describes more than it holds is refused before memory or time is spent on it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kpu.storage import beneath
from kpu.util.digests import digest, digest_of
from tests.support.trained import small_run, timm_cache
from trainer.export.description import CONFIG
from trainer.export.export import export
from trainer.export.program import PROGRAM
from trainer.util.files import digest_file

MOST_MEGABYTES = 300
MOST_SECONDS = 60
WIDE = 2**16
LOAD = """
import resource, sys, time
import timm, torch, trainer.export.load
from kpu.errors import KpuError
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
from trainer import load_student
load_student(sys.argv[1])
for forged in sys.argv[2:]:
    before, begin = peak(), time.monotonic()
    try:
        load_student(forged)
        said = "loaded"
    except KpuError as error:
        said = f"{type(error).__name__}: {error}".partition("\\n")[0]
    print(peak() - before, round(time.monotonic() - begin, 1), said, flush=True)
"""


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def on_timm(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A side student on a timm base that is bundled."""
    run = small_run(place, "forged", caches=(str(timm_cache(place, "test_vit")),))
    return export(run, tmp_path_factory.mktemp("timm") / "out", program=False).path


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm model trained whole."""
    student = (("kind", "full"), ("model", "timm:test_resnet"), ("weights", "random"))
    run = small_run(place, "whole", caches=(str(timm_cache(place, "test_vit")),), student=student)
    return export(run, tmp_path_factory.mktemp("whole") / "out", program=False).path


def forge(source: Path, out: Path, changes: dict[str, Any]) -> Path:
    """A copy whose `config.json` says other things, sealed as if it had always said them."""
    shutil.copytree(source, out)
    document = json.loads((out / CONFIG).read_bytes())
    document.pop("digest")
    for path, value in changes.items():
        *way, last = path.split(".")
        inner: Any = document
        for step in way:
            inner = inner[int(step) if step.isdigit() else step]
        inner[last] = value
    (out / CONFIG).write_text(json.dumps({**document, "digest": digest_of(document)}))
    return out


SIDE = [
    {"student.width": WIDE},
    {"student.depth": WIDE},
    {"student.width": WIDE, "student.depth": WIDE},
    {"base.outputs.0.shape": [2**24]},
    {"base.model_args": {"depth": 10**6}},
    {"base.model_args": {"embed_dim": WIDE}},
    {"base.model_args": {"num_classes": 10**9}},
    {"base.model": "timm:vit_giant_patch14_dinov2"},
    {"base.input.size": [2**14, 2**14]},
]
FULL = [
    {"student.model": "timm:vit_giant_patch14_dinov2"},
    {"student.model": "timm:resnet152"},
    {"projector.hidden": WIDE},
]


@pytest.mark.parametrize(("fixture", "forgeries"), [("on_timm", SIDE), ("whole", FULL)])
def test_sizes_that_no_tensor_has_cost_neither_memory_nor_time(
    fixture: str, forgeries: list[dict[str, Any]], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    genuine = request.getfixturevalue(fixture)
    forged = [forge(genuine, tmp_path / str(number), changes) for number, changes in enumerate(forgeries)]
    command = [sys.executable, "-W", "ignore", "-c", LOAD, genuine, *forged]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(forgeries)
    for changes, line in zip(forgeries, lines, strict=True):
        megabytes, seconds, said = line.split(" ", 2)
        assert said.startswith(("CorruptError", "ConfigError", "MismatchError")), (changes, line)
        assert int(megabytes) < MOST_MEGABYTES, (changes, line)
        assert float(seconds) < MOST_SECONDS, (changes, line)


def test_a_file_is_hashed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / PROGRAM).write_bytes(bytes(range(256)) * 2**13)
    expected = digest(bytes(range(256)) * 2**13)
    monkeypatch.setattr(beneath, "read_all", lambda *_: pytest.fail("it was read whole"))
    assert digest_file(tmp_path / PROGRAM) == expected
