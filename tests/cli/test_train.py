"""`kpu-train eval`, `export` and `compare`: what they print, write and refuse."""

import csv
import io
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.train import app
from tests.support.toys import assert_refused
from tests.support.trained import labelled_cache, small_run
from trainer import load_student

PCA = {
    "unify": (
        ("mode", "pca"), ("pca_rows", 64), ("lowest_reconstruction", -1e9), ("lowest_rank", 0.0), ("lowest_std", 0.0),
    )
}  # fmt: skip
"""A shared space, which gates measure and let pass."""


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    return small_run(place)


def kpu_train(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_eval(run: Path) -> None:
    found = json.loads(kpu_train("eval", run, "--json").stdout)
    assert set(found["teachers"]) == {"general", "big"}
    lines = kpu_train("eval", run).stdout.splitlines()
    row = next(line.split() for line in lines if line.startswith("big") and "student" in line)
    big = found["teachers"]["big"]
    keys = ("agreement", "kappa", "majority", "accuracy", "r2_global", "r2_patch")
    assert row == ["big", "student", *(f"{big[key]:.3f}" for key in keys)]
    student = next(line.split() for line in lines if line.startswith("student"))
    assert student[1:3] == [f"{found['linear_probe']:.3f}", f"{found['knn']:.3f}"]


def test_export(run: Path, tmp_path: Path) -> None:
    result = kpu_train("export", run, "--out", tmp_path / "out", "--no-program")
    assert result.exit_code == 0, result.output
    assert "images against cache, 32 rows, base: global 0.0" in result.stdout
    assert f"exported: {tmp_path / 'out'}" in result.stdout
    assert load_student(tmp_path / "out").description.outputs == ("global", "patch")
    assert_refused(kpu_train("export", run, "--out", tmp_path / "out"), "expected a path where nothing exists")
    moved = kpu_train("export", run, "--out", tmp_path / "other", "--images", tmp_path / "nowhere")
    assert_refused(moved, "error: --images: expected the folder", "nowhere; set --images to where they are now")
    assert not (tmp_path / "other").exists()


def test_eval_says_how_to_name_images_that_moved(place: Path, tmp_path: Path) -> None:
    student = (("kind", "full"), ("model", f"torch:{place}/toy.py:toy"))
    refused = kpu_train("eval", small_run(place, "run-full", student=student), "--images", tmp_path / "nowhere")
    assert_refused(refused, "error: --images: expected the folder", "nowhere; set --images to where they are now")


def test_compare(run: Path, place: Path, tmp_path: Path) -> None:
    kpu_train("eval", run, "--json")
    result = kpu_train("compare", run, run, "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert sum(line.startswith("run ") for line in result.stdout.splitlines()) == 3  # heading and two runs
    assert (tmp_path / "p.png").exists()
    values = json.loads(kpu_train("compare", run, "--plot", tmp_path / "p.png", "--json").stdout)
    assert values[0]["evaluation"]["linear_probe"] is not None
    other = labelled_cache(place, "other", 1, ())
    kpu_train("eval", run, "--cache", other)
    values = json.loads(kpu_train("compare", run, "--cache", other, "--plot", tmp_path / "p.png", "--json").stdout)
    assert values[0]["evaluation"]["caches"] == [str(other)]
    lacking = small_run(place, "run-frozen", student=(("kind", "frozen"),))
    refused = kpu_train("compare", lacking, "--cache", other, "--plot", tmp_path / "q.png")
    assert_refused(refused, "expected an evaluation on this cache")


def test_tables_for_papers_and_programs(run: Path, tmp_path: Path) -> None:
    plot = ("--plot", tmp_path / "p.png")
    (row,) = csv.DictReader(io.StringIO(kpu_train("compare", run, "--csv", *plot).stdout))
    assert row["run"] == "run" and float(row["R2 big global"]) <= 1
    assert kpu_train("compare", run, "--latex", *plot).stdout.startswith(r"\begin{tabular}{ll")
    found = kpu_train("eval", run, "--markdown").stdout
    assert found.startswith("| teacher | by |") and "\n\n| features of |" in found
    refused = kpu_train("compare", run, "--csv", "--json", *plot)
    assert_refused(refused, "expected at most one of --json, --markdown, --csv and --latex, found --json --csv")


def test_images_that_are_in_two_caches_are_noted(run: Path, place: Path, tmp_path: Path) -> None:
    one, two = labelled_cache(place), labelled_cache(place, "base-alone", teachers=())
    note = f"note: {one} and {two} are of the same images: what both have of an image counts twice"
    caches = ("--cache", one, "--cache", two)
    fitted = kpu_train("fit", "-c", run / "config.yaml", *caches, "--out", tmp_path / "run")
    assert note in fitted.stdout.splitlines()
    assert note in kpu_train("eval", tmp_path / "run").stdout.splitlines()
    assert_refused(kpu_train("eval", run, "--cache", one, "--cache", one), "expected each cache once")


@contextmanager
def full_disk() -> Iterator[None]:
    """Files may have no more than 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_was_measured_is_printed_and_the_failure_told_where_it_cannot_be_kept(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("eval*.json")))
    with full_disk():
        as_text, as_json = kpu_train("eval", copy), kpu_train("eval", copy, "--json")
    assert any(line.startswith("student") for line in as_text.stdout.splitlines())
    for result in (as_text, as_json):
        assert_refused(result, "could not be kept with the run", "eval.json: cannot write", "free some space", code=1)
    assert "eval.json" in json.loads(as_json.stdout)["unkept"]
    assert not list(copy.glob("*eval*"))


def test_a_plot_on_a_full_disk(run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"former")
    with full_disk():
        result = kpu_train("compare", run, "--plot", tmp_path / "p.png")
    assert_refused(result, "p.png: cannot write", "free some space and give the same command again", code=1)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("p.png", b"former")]
    assert_refused(kpu_train("compare", run, "--plot", tmp_path / "p.png/q.png"), "q.png: cannot write")


def test_an_empty_folder_is_not_a_run(tmp_path: Path) -> None:
    for command in (("eval",), ("export", "--out", tmp_path / "out"), ("compare",)):
        assert_refused(kpu_train(*command, tmp_path), "expected a run of kpu-train")


def zeroed(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(8) + data[len(data) // 2 + 8 :]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def strip_digests(run: Path) -> None:
    """Leave a run as older releases made it."""
    config = run / "config.yaml"
    config.write_bytes(config.read_bytes().partition(b"\n")[2])
    for name in ("sources.json", "summary.json"):
        document = json.loads((run / name).read_bytes())
        del document["digest"], document["digests"]
        (run / name).write_text(json.dumps(document, indent=1))


@pytest.mark.parametrize("damage", [zeroed, cut])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "statistics.safetensors", "heads.safetensors", "space.json", "sources.json"]
)
def test_a_damaged_run_is_neither_measured_nor_exported(
    name: str, damage: Callable[[bytes], bytes], place: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(small_run(place, "run-pca", **PCA), tmp_path / "run"))
    (broken / name).write_bytes(damage((broken / name).read_bytes()))
    for command in (("eval",), ("export", "--out", tmp_path / "out")):
        assert_refused(kpu_train(*command, broken), str(broken / name), "copy the run again", code=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "old"),
    [
        (zeroed, False), (cut, False), (lambda _: b"", False), (lambda _: b"{}", False),
        (lambda _: b"", True), (lambda _: b"{}", True), (lambda _: b"\xff\x00", True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["config.yaml", "sources.json", "summary.json"])
def test_a_damaged_document_of_a_run_is_one_message(
    name: str, old: bool, damage: Callable[[bytes], bytes], run: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(run, tmp_path / "run"))
    arguments = ("-c", run / "config.yaml", "--out", broken, "--resume")
    if old:
        strip_digests(broken)
    (broken / name).write_bytes(damage((broken / name).read_bytes()))
    commands = [("eval", broken), ("fit", *arguments)]
    if name != "sources.json":
        commands.append(("compare", broken, "--plot", tmp_path / "p.png"))
    for command in commands:
        assert_refused(kpu_train(*command), str(broken / name), code=1)


def test_a_run_without_digests_is_read_and_says_so(run: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(run, tmp_path / "run"))
    strip_digests(old)
    found = json.loads(kpu_train("eval", old, "--json").stdout)
    kept = json.loads(kpu_train("eval", run, "--json").stdout)
    assert found["notes"] == [
        "statistics.safetensors, heads.safetensors, model.safetensors: the run keeps no digest, so that damage would "
        "not show"
    ]
    assert found["teachers"] == kept["teachers"] and kept["notes"] == []
    assert kpu_train("fit", "-c", run / "config.yaml", "--out", old, "--resume").exit_code == 0
    assert "no digest" in kpu_train("export", old, "--out", tmp_path / "out", "--no-program").stdout


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, cli.train, cli.views.evaluation, trainer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
