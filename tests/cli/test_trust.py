"""Opening what a stranger made runs none of his code, and one's own needs no flag."""

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kpu.errors import CorruptError, TrustError
from tests.cli.test_train import kpu_train
from tests.support.toys import assert_refused, kpu, snapshot, write_images
from trainer import load_student

MARKER = "KPU_TEST_MARKER"
EVIL = """
import os
from pathlib import Path

import torch
from torch import nn

if "KPU_TEST_MARKER" in os.environ:
    Path(os.environ["KPU_TEST_MARKER"]).write_text("ran")


class Blocks(nn.Module):
    data_config = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(nn.Conv2d(3, 6, 4, 4))

    def forward(self, images):
        patch = self.blocks(images)
        return {"global": patch.mean((2, 3)), "patch": patch}


def blocks():
    return Blocks()
"""
SMALL = {
    "base": "t",
    "projector": {"hidden": 8},
    "optim": {"epochs": 1},
    "batch_size": 16,
    "validation": 0.25,
    "device": "cpu",
    "threads": 1,
}


def write_config(place: Path, cache: Path, name: str, **changes: Any) -> Path:
    file = place / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "caches": [str(cache)], **changes}))
    return file


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`evil.py`, and by it a cache, a run of a full student, one of a side student, and the exports of both."""
    place = tmp_path_factory.mktemp("strange")
    (place / "evil.py").write_text(EVIL)
    model = f"torch:{place}/evil.py:blocks"
    images = write_images(place / "images", 64)
    students = {
        "full": {"kind": "full", "model": model, "weights": "random"},
        "side": {"kind": "side", "width": 8, "depth": 1},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KPU_TRUSTED_CODE", str(place / "his-list"))
        options = ["--set=unit_rows=64", "--set=executor.threads=1"]
        assert kpu("extract", images, f"--teacher=t={model}", *options, "-o", place / "o.kpu").exit_code == 0
        for kind, student in students.items():
            config = write_config(place, place / "o.kpu", kind, student=student)
            assert kpu_train("fit", "-c", config, "-o", place / kind).exit_code == 0
            done = kpu_train("export", place / kind, "-o", place / f"{kind}-out", "--no-program")
            assert done.exit_code == 0, done.output
    return place


@pytest.fixture
def victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Somebody with a list of his own, which is empty; in the end nothing has run."""
    monkeypatch.setenv("KPU_TRUSTED_CODE", str(tmp_path / "home/kpu/trusted-code"))
    monkeypatch.setenv(MARKER, str(tmp_path / "marker"))
    yield tmp_path
    assert not (tmp_path / "marker").exists()


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def complete(victim: Path, file: Path) -> tuple[str, ...]:
    """What a refusal says: the file, its digest, and what to type."""
    key = digest_of(file)
    place = victim / "home/kpu/trusted-code"
    return (
        f"expected code that you named or trust, found file {file}, SHA-256 {key}",
        "nothing of it was run",
        "give --trust-code",
        f"mkdir -p {place.parent} && echo {key} >> {place}",
    )


def test_a_strangers_cache_runs_nothing(strange: Path, victim: Path) -> None:
    said = complete(victim, strange / "evil.py")
    assert_refused(kpu("verify", "--deep", strange / "o.kpu"), "teacher 't'", *said)
    for changes in ({"student": {"kind": "parallel", "width": 4}}, {"targets": {"source": "live"}}):
        config = write_config(victim, strange / "o.kpu", "train", **changes)
        assert_refused(kpu_train("fit", "-c", config, "-o", victim / "run"), *said)
        assert not (victim / "run").exists()


def test_a_strangers_run_runs_nothing(strange: Path, victim: Path) -> None:
    said = complete(victim, strange / "evil.py")
    before = snapshot(strange)
    assert_refused(kpu_train("eval", strange / "full"), "student.model", *said)
    for kind in ("full", "side"):
        assert_refused(kpu_train("export", strange / kind, "-o", victim / "out"), *said)
    assert not (victim / "out").exists()
    assert_refused(kpu_train("fit", "-o", strange / "full", "--resume"), "student.model", *said)
    assert snapshot(strange) == before


def test_what_needs_no_code_of_a_stranger_works(strange: Path, victim: Path) -> None:
    config = write_config(victim, strange / "o.kpu", "train", student={"width": 8, "depth": 1})
    assert kpu_train("fit", "-c", config, "-o", victim / "run").exit_code == 0
    side = Path(shutil.copytree(strange / "side", victim / "side"))
    assert kpu_train("eval", side, "--json").exit_code == 0
    assert kpu("verify", strange / "o.kpu").exit_code == 0


@pytest.mark.parametrize(("kind", "name"), [("full", "student_model.py"), ("side", "base_model.py")])
def test_a_strangers_export_runs_nothing(kind: str, name: str, strange: Path, victim: Path) -> None:
    folder = strange / f"{kind}-out"
    with pytest.raises(TrustError) as refused:
        load_student(folder)
    key = digest_of(folder / name)
    for said in (str(folder / name), f"SHA-256 {key}", "pass trust_code=True", f"echo {key} >> {victim}"):
        assert said in str(refused.value)
    card = (folder / "README.md").read_text()
    assert "comes with code" in card and f"    {key}  {name}\n" in card


@pytest.mark.parametrize(("kind", "name"), [("full", "student_model.py"), ("side", "base_model.py")])
def test_an_edited_export_is_not_loaded_whoever_trusts_it(kind: str, name: str, strange: Path, victim: Path) -> None:
    edited = Path(shutil.copytree(strange / f"{kind}-out", victim / "edited"))
    (edited / name).write_text((edited / name).read_text() + "\n")
    with pytest.raises(CorruptError, match=rf"{name}: is not what was exported"):
        load_student(edited, trust_code=True)


def test_an_edited_description_is_refused(strange: Path, victim: Path) -> None:
    edited = Path(shutil.copytree(strange / "side-out", victim / "edited"))
    config = json.loads((edited / "config.json").read_text())
    config["input"]["mean"] = [0.4, 0.5, 0.5]
    (edited / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptError, match=r"config\.json: is not what was exported"):
        load_student(edited, trust_code=True)
    config["base"]["model"] = "torch:../full-out/student_model.py:blocks"
    del config["digest"]
    (edited / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="keeps no digest of it"), pytest.raises(CorruptError, match="in the folder"):
        load_student(edited)


def test_a_module_that_a_file_names_is_neither_imported_nor_called(
    strange: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = victim / "site/evilpackage"
    package.mkdir(parents=True)
    for name in ("__init__.py", "models.py"):
        (package / name).write_text(EVIL)
    monkeypatch.syspath_prepend(package.parent)
    edited = Path(shutil.copytree(strange / "full", victim / "run"))
    text = (edited / "config.yaml").read_text()
    for place in ("evilpackage.models", "os"):
        model = f"torch:{place}:{'blocks' if place != 'os' else 'getcwd'}"
        values = {**yaml.safe_load(text), "student": {"kind": "full", "model": model, "weights": None}}
        (edited / "config.yaml").write_text(yaml.safe_dump(values))
        assert_refused(kpu_train("eval", edited), f"found module {place} (", "nothing of it was run")


def run_record(cache: Path) -> Path:
    return next((cache / "runs").glob("*.json"))


def fail(cache: Path, **config: Any) -> None:
    """Withdraw unit 0, and say that it failed, in a run with this configuration."""
    (cache / "teachers/t/commits/000000.json").unlink(missing_ok=True)
    record = json.loads(run_record(cache).read_text())
    record["failed"] = [{"teacher": "t", "unit": 0, "reason": "it broke"}]
    record["config"] = {**record["config"], **config} if config != {"config": None} else None
    run_record(cache).write_text(json.dumps(record))


def test_a_strangers_failed_units_run_nothing(strange: Path, victim: Path) -> None:
    cache = Path(shutil.copytree(strange / "o.kpu", victim / "o.kpu"))
    fail(cache)
    assert_refused(kpu("retry-failed", cache), "teacher torch:", *complete(victim, strange / "evil.py"))


def test_an_edited_run_record_decides_nothing_but_units(strange: Path, victim: Path) -> None:
    """One's own cache, whose unsealed records somebody rewrote."""
    (victim / "own.py").write_text(EVIL.replace("KPU_TEST_MARKER", "NONE"))
    options = ["--set=unit_rows=64", "--set=executor.threads=1", "-o", victim / "o.kpu"]
    made = kpu("extract", strange / "images", f"--teacher=t=torch:{victim}/own.py:blocks", *options)
    assert made.exit_code == 0, made.output
    evil = f"torch:{strange}/evil.py:blocks"
    config: dict[str, Any] = {
        "teachers": {"t": {"model": evil, "weights": "/nowhere"}, "u": {"model": evil}},
        "data": {"source": str(victim)},
        "executor": {"kind": "ray", "address": "ray://192.0.2.1:1", "batch_size": 10**12},
        "calibration_from": str(strange / "o.kpu"),
        "seed": "no number",
    }
    whole = {name: each for name, (_, each) in snapshot(victim / "o.kpu").items() if name.startswith("teachers")}
    for edit in (config, {"config": None}):
        fail(victim / "o.kpu", **edit)
        done = kpu("retry-failed", victim / "o.kpu")
        assert done.exit_code == 0, done.output
        found = {name: each for name, (_, each) in snapshot(victim / "o.kpu").items() if name.startswith("teachers")}
        assert found == whole


def test_a_retry_lists_what_was_planned_wherever_it_is_now(strange: Path, tmp_path: Path) -> None:
    """Two of three tars, which the root alone does not name; then they move, and then strangers' are named instead."""
    (tmp_path / "own.py").write_text(EVIL)
    for name, numbers in (("a-0", range(30)), ("a-1", range(30, 64)), ("a-05", range(3))):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for number in numbers:
                tar.add(strange / f"images/{number:03d}.png", f"{number:03d}.png")
    tars = tmp_path / "tars"
    tars.mkdir()
    for tar_file in tmp_path.glob("*.tar"):
        tar_file.rename(tars / tar_file.name)
    options = ["--set=unit_rows=64", "--set=executor.threads=1", "--set=data.max_pixels=1000", "-o", tmp_path / "o.kpu"]
    made = kpu("extract", f"{tars}/a-?.tar", f"--teacher=t=torch:{tmp_path}/own.py:blocks", *options)
    assert made.exit_code == 0, made.output
    fail(tmp_path / "o.kpu", data={"source": f"{strange}/images"})  # the plan's place holds more than was planned
    assert_refused(kpu("retry-failed", tmp_path / "o.kpu"), "was made from other data")
    for data in ({"source": f"{tars}/a-?.tar"}, {"source": f"{tars}/a-{{0,1}}.tar", "max_pixels": 1000}):
        fail(tmp_path / "o.kpu", data=data)
        done = kpu("retry-failed", tmp_path / "o.kpu")
        assert done.exit_code == 0, done.output
    moved = tars.rename(tmp_path / "moved")
    fail(tmp_path / "o.kpu", data={"source": f"{moved}/a-?.tar"})
    done = kpu("retry-failed", tmp_path / "o.kpu")
    assert done.exit_code == 0, done.output


def test_a_retry_with_a_configuration_of_ones_own(
    strange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KPU_TRUSTED_CODE", str(tmp_path / "list"))
    cache = Path(shutil.copytree(strange / "o.kpu", tmp_path / "o.kpu"))
    fail(cache)
    own = {"data": {"source": str(strange / "images")}, "teachers": {"t": {"model": f"torch:{strange}/evil.py:blocks"}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    done = kpu("retry-failed", cache, "-c", tmp_path / "own.yaml")
    assert done.exit_code == 0, done.output
    assert digest_of(strange / "evil.py") in (tmp_path / "list").read_text()


# --- whoever trusts it ---


def test_what_the_refusal_says_to_type_lets_it_run(
    strange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KPU_TRUSTED_CODE", str(tmp_path / "home/trusted-code"))
    monkeypatch.setenv(MARKER, str(tmp_path / "marker"))
    run = Path(shutil.copytree(strange / "full", tmp_path / "run"))
    assert kpu_train("eval", run, "--trust-code", "--json").exit_code == 0
    assert (tmp_path / "marker").exists()
    assert not (tmp_path / "home").exists()  # this time only
    refused = kpu_train("eval", run, "--json")
    command = refused.stderr.partition("to trust it from now on: ")[2].strip()
    subprocess.run(command, shell=True, check=True)
    assert kpu_train("eval", run, "--json").exit_code == 0
    load_student(strange / "full-out")  # the same bytes elsewhere


def test_ones_own_code_is_remembered(strange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` adds what the user named, and `export` what it writes; runs and exports that moved need no flag."""
    monkeypatch.setenv("KPU_TRUSTED_CODE", str(tmp_path / "list"))
    student = {"kind": "full", "model": f"torch:{strange}/evil.py:blocks", "weights": "random"}
    config = write_config(tmp_path, strange / "o.kpu", "train", student=student)
    assert kpu_train("fit", "-c", config, "-o", tmp_path / "run").exit_code == 0
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert kpu_train("export", moved, "-o", tmp_path / "out", "--no-program").exit_code == 0
    load_student((tmp_path / "out").rename(tmp_path / "elsewhere"))
    assert (tmp_path / "list").read_text() == f"{digest_of(strange / 'evil.py')}  {strange / 'evil.py'}\n"


def test_ones_own_export_of_code_that_one_let_run_loads(
    strange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KPU_TRUSTED_CODE", str(tmp_path / "list"))
    done = kpu_train("export", strange / "side", "-o", tmp_path / "out", "--no-program", "--trust-code")
    assert done.exit_code == 0, done.output
    load_student(tmp_path / "out")


def test_a_list_that_cannot_be_written_is_said(strange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KPU_TRUSTED_CODE", str(tmp_path / "file/list"))
    student = {"kind": "full", "model": f"torch:{strange}/evil.py:blocks", "weights": "random"}
    config = write_config(tmp_path, strange / "o.kpu", "train", student=student)
    fitted = kpu_train("fit", "-c", config, "-o", tmp_path / "run")
    assert fitted.exit_code == 0, fitted.output
    assert f"note: the code that you named cannot be remembered in {tmp_path}/file/list (" in fitted.stdout
    assert_refused(kpu_train("eval", tmp_path / "run"), "give --trust-code")
    made = kpu("extract", strange / "images", "-t", f"t={student['model']}", "-o", tmp_path / "o.kpu")
    assert made.exit_code == 0 and "needs --trust-code" in made.stderr


def test_a_students_code_that_was_edited_is_told(
    strange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KPU_TRUSTED_CODE", str(tmp_path / "list"))
    (tmp_path / "own.py").write_text(EVIL)
    student = {"kind": "full", "model": f"torch:{tmp_path}/own.py:blocks", "weights": "random"}
    config = write_config(tmp_path, strange / "o.kpu", "train", student=student)
    assert kpu_train("fit", "-c", config, "-o", tmp_path / "run").exit_code == 0
    (tmp_path / "own.py").write_text(EVIL.replace("patch.mean((2, 3))", "patch.amax((2, 3))"))
    commands = [("eval", tmp_path / "run"), ("eval", tmp_path / "run", "--trust-code")]
    commands += [("export", tmp_path / "run", "-o", tmp_path / "out", "--trust-code")]
    commands += [("fit", "-c", config, "-o", tmp_path / "run", "--resume")]
    for command in commands:
        assert_refused(
            kpu_train(*command), "own.py:blocks: expected the code that was used before (digest", "restore it"
        )


def test_an_export_of_an_older_release_loads_with_a_warning(
    strange: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its description had no digest of itself. Code in it is not trusted for that."""
    old = Path(shutil.copytree(strange / "side-out", victim / "old"))
    config = json.loads((old / "config.json").read_text())
    del config["digest"], config["decoding"]
    (old / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    with pytest.warns(UserWarning, match="older release keeps no digest"), pytest.raises(TrustError):
        load_student(old)
    monkeypatch.delenv(MARKER)
    with pytest.warns(UserWarning, match="older release keeps no digest"):
        student = load_student(old, trust_code=True)
    image = strange / "images/000.png"
    assert student(image)["global"].equal(load_student(strange / "side-out", trust_code=True)(image)["global"])


def test_a_run_of_an_older_release_keeps_no_digest_of_its_code(strange: Path, victim: Path) -> None:
    old = Path(shutil.copytree(strange / "full", victim / "run"))
    document = json.loads((old / "sources.json").read_text())
    del document["code"], document["digest"]
    (old / "sources.json").write_text(json.dumps(document))
    assert_refused(kpu_train("eval", old), *complete(victim, strange / "evil.py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(MARKER)
        found = json.loads(kpu_train("eval", old, "--trust-code", "--json").stdout)
    assert any(f"torch:{strange}/evil.py:blocks: the run keeps no digest" in note for note in found["notes"])
