"""What both commands do first, and what they refuse before anything large is loaded."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.cache import app as kpu_cache
from cli.train import app as kpu_train
from kpu.own_packages import PACKAGES
from tests.support.trained import small_run

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys\nfrom cli.{name} import app\ntry:\n    app()\nfinally:\n    print('torch' in sys.modules)\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def started(name: str, *arguments: object) -> tuple[str, str]:
    """Standard output's last line (whether torch was loaded) and standard error of a command in a process."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(name=name), *map(str, arguments)], text=True, capture_output=True, cwd=ROOT
    )
    return done.stdout.splitlines()[-1], done.stderr


def test_the_version() -> None:
    for app in (kpu_cache, kpu_train):
        result = CliRunner().invoke(app, ["--version"])
        assert result.exit_code == 0 and result.stdout.startswith("kpu ")


@pytest.mark.parametrize("app", [kpu_cache, kpu_train])
def test_every_command_shows_an_example(app: object) -> None:
    names = [command.name or command.callback.__name__ for command in app.registered_commands]  # type: ignore[attr-defined]
    assert len(names) >= 5
    for name in names:
        result = CliRunner().invoke(app, [name, "--help"])  # type: ignore[arg-type]
        assert (
            result.exit_code == 0 and f"Example: kpu-{'cache' if app is kpu_cache else 'train'} {name}" in result.stdout
        )


def test_what_needs_no_model_is_refused_before_torch_is_loaded(place: Path, tmp_path: Path) -> None:
    run = small_run(place)
    cache = next(line for line in (run / "config.yaml").read_text().splitlines() if line.startswith("- /"))[2:]
    fit = ("fit", "--cache", cache, "--set", "base=general")
    refused: list[tuple[str, tuple[object, ...], str]] = [
        ("train", (*fit, "-o", run), "a run exists there"),
        ("train", (*fit, "-o", tmp_path / "none", "--resume"), "expected a run of kpu-train"),
        ("train", ("fit", "--cache", tmp_path / "x.kpu", "--set", "base=general", "-o", tmp_path / "r"), "x.kpu"),
        ("train", (*fit[:3], "--set", "base=genral", "-o", tmp_path / "r"), "did you mean 'general'"),
        ("train", ("fit", "-o", run, "--resume", "--set", "seed=7"), "seed: begun with 0, now 7"),
        ("train", (*fit, "-o", "/proc/r"), "expected a place that can be written to, found /proc"),
        ("train", (*fit, "-o", tmp_path / "r", "--set", "student.layers=[layr]"), "student.layers: "),
        (
            "train",
            (*fit, "-o", tmp_path / "r", "--set", "student={kind: full, model: timm:x, weights: w.pth}"),
            "student.weights: expected a .safetensors or .pth file, found nothing at w.pth",
        ),
        (
            "train",
            ("fit", "-c", ROOT / "examples/demo/demo.yaml", "-o", tmp_path / "r"),
            "found one of `kpu-cache extract` (it has data, unit_rows); use it with `kpu-cache extract -c",
        ),
        (
            "cache",
            ("extract", "-c", ROOT / "examples/demo/train.yaml"),
            "found one of `kpu-train fit` (it has base, caches, optim, student)",
        ),
        ("train", ("eval", tmp_path / "none"), "expected a run of kpu-train"),
        ("train", ("eval", cache), "found a cache; `kpu-cache info`"),
        ("cache", ("status", run), "found a run of kpu-train; measure it with `kpu-train eval`"),
        ("train", ("export", run, "-o", run), "expected a path where nothing exists"),
        ("cache", ("extract", tmp_path / "none", "-o", tmp_path / "x.kpu", "-t", "t=timm:x"), "no such file or folder"),
    ]
    for name, arguments, message in refused:
        loaded, error = started(name, *arguments)
        assert message in error and loaded == "False", (arguments, error)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A copy of what an installation holds."""
    for name in ("kpu", *PACKAGES):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def called(packages: Path, *before: Path) -> subprocess.CompletedProcess[str]:
    path = [str(each) for each in (*before, packages)]
    code = (
        f"import sys; sys.path[:0] = {path!r}; sys.argv = ['kpu-train', 'compare', 'none']\n"
        "from kpu.entry import kpu_train; kpu_train()"
    )
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=packages)


def test_a_package_that_another_distribution_overwrote_is_told(packages: Path) -> None:
    assert "expected a run of kpu-train" in called(packages).stderr
    (packages / "trainer/__init__.py").write_text("import coqpit\n")
    ended = called(packages)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert f"import name 'trainer': expected KPU's package in {packages}/trainer" in ended.stderr
    assert "pipx install" in ended.stderr
    (packages / "trainer/__init__.py").unlink()
    assert "import name 'trainer': expected KPU's package" in called(packages).stderr


def test_files_of_the_user_do_not_replace_packages(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "mine/trainer").mkdir(parents=True)
    for name in ("pipeline.py", "cache.py", "cli.py", "trainer/__init__.py"):
        (tmp_path / "mine" / name).write_text("raise SystemExit('ran')")
    assert called(packages, tmp_path / "mine").stderr == called(packages).stderr


def test_names_are_printed_as_they_are(tmp_path: Path) -> None:
    refused = CliRunner().invoke(kpu_cache, ["status", str(tmp_path / ":smile:[red].kpu")])
    assert f"{tmp_path}/:smile:[red].kpu" in refused.stderr


def test_an_interruption_before_anything_is_imported_is_one_line() -> None:
    code = (
        "import builtins, sys\nfrom kpu.entry import kpu_train\ndo = builtins.__import__\n"
        "def stop(name, *more):\n    if name == 'cli.train': raise KeyboardInterrupt\n    return do(name, *more)\n"
        "builtins.__import__ = stop\nkpu_train()"
    )
    ended = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (1, "stopped: nothing was begun\n")
