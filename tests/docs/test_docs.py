"""What the pages show is what the code does."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from cli.cache import app as kpu_cache
from cli.train import app as kpu_train
from pipeline.config import ExtractConfig
from trainer.config import TrainConfig
from trainer.sweep.sweeps import SweepConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODELS = (ExtractConfig, TrainConfig, SweepConfig)


def settings_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("settings_reference", ROOT / "docs/settings_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    reference = settings_reference()
    for name, field in model.model_fields.items():
        section = reference._section(field.annotation)
        if section is None:
            yield f"{prefix}{name}", field
        else:
            named = ".<name>" if "dict[" in str(field.annotation) else ""
            yield from fields(section, f"{prefix}{name}{named}.")


@pytest.mark.parametrize("model", MODELS)
def test_the_reference_explains_every_key(model: type[BaseModel]) -> None:
    text = settings_reference().reference(model)
    rows = dict(re.findall(r"^\| `([^`]+)` \|.*\| ([^|]*) \|$", text, flags=re.MULTILINE))
    expected = [key for key, _ in fields(model)]
    assert len(expected) > 4 and sorted(rows) == sorted(expected)
    assert [key for key, meaning in rows.items() if not meaning.strip()] == []


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_configurations_of_the_pages_are_valid() -> None:
    seen = 0
    for page in PAGES:
        for block in blocks(page, "yaml"):
            values = yaml.safe_load(block)
            model = SweepConfig if "grid" in values else TrainConfig if "caches" in values else ExtractConfig
            if "config" in values or {"out", "caches"} & values.keys():
                model.model_validate(values)
                seen += 1
    assert seen >= 5


def commands(page: Path) -> Iterator[list[str]]:
    """The commands of a page's indented blocks, continued lines joined."""
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^    (?:\$ )?(kpu-(?:cache|train) .+)$", text, flags=re.MULTILINE):
        yield shlex.split(line, comments=True)


def test_commands_of_the_pages_have_options_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing is, so that each is refused before it does anything
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) > 12
    for program, *arguments in found:
        result = CliRunner().invoke({"kpu-cache": kpu_cache, "kpu-train": kpu_train}[program], arguments)
        assert result.exit_code == 2 and "Usage:" not in result.output + result.stderr, (
            program,
            arguments,
            result.output,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quickstart_and_all_examples_in_python_run(tmp_path: Path) -> None:
    """The demo's commands one after another, then every example in Python that reads what they made."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    shown = list(commands(ROOT / "docs/quickstart.md"))
    run("python", "examples/demo/write_digits.py", "build/demo/digits")
    for command in shown:
        if "imagenet" not in " ".join(command):
            run(*command)
    assert [command[1] for command in shown][:2] == ["extract", "extract"] or len(shown) > 5
    ran = 0
    for page in PAGES:
        text = page.read_text()
        for block in blocks(page, "python"):
            if "build/demo" in block and "onnx" not in block:
                printed = run("python", "-c", block)
                ran += 1
                expected = re.search(r"```\n\n    (.+)\n", text[text.index(block) :])
                if expected is not None:
                    assert printed.strip() == expected[1].strip(), page
    assert ran >= 5
