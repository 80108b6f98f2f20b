"""The rooms stay small, and nothing is written twice in extraction and training."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kpu", "pipeline", "trainer", "cli")
LONGEST_REPETITION = 5  # lines


def folders() -> Iterator[Path]:
    for package in PACKAGES:
        yield from (folder for folder in (ROOT / package).rglob("*") if (folder / "__init__.py").is_file())


@pytest.mark.parametrize("folder", sorted(folders()), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_folder_holds_more_than_14_files(folder: Path) -> None:
    assert len([file for file in folder.glob("*.py") if file.name != "__init__.py"]) <= 14


def lines_of_code(file: Path) -> list[str]:
    """Lines without indentation; imports, comments and blank lines left out."""
    text = file.read_text()
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    left_out = {line for node in imports for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    lines = [line.strip() for number, line in enumerate(text.splitlines(), 1) if number not in left_out]
    return [line for line in lines if line and not line.startswith("#")]


def runs_of_code(package: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every run of lines that is one too long to be repeated, with its place."""
    for file in sorted((ROOT / package).rglob("*.py")):
        code = lines_of_code(file)
        for start in range(len(code) - LONGEST_REPETITION):
            yield tuple(code[start : start + LONGEST_REPETITION + 1]), f"{file.relative_to(ROOT)}: {code[start]}"


def test_pipeline_and_trainer_repeat_no_six_lines() -> None:
    in_pipeline = dict(runs_of_code("pipeline"))
    assert len(in_pipeline) > 1000
    assert [(in_pipeline[run], place) for run, place in runs_of_code("trainer") if run in in_pipeline] == []
