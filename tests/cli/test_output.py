"""What a file says never steers the terminal that it is printed on."""

import io
import json
from pathlib import Path

import pytest
from rich.panel import Panel

from cli.output import SafeConsole, dump_json, printable
from cli.views.tables import Table
from tests.support.builders import build
from tests.support.forging import forge_document, reseal
from tests.support.toys import kpu

STEERING = "\x1b[2Ja\x1b]0;x\x07b\x9bc\x7fd\u202ee\r"


def is_clean(text: str) -> bool:
    return all(character == "\n" or character.isprintable() for character in text)


def test_what_steers_a_terminal_is_spelled_out() -> None:
    assert printable(STEERING) == r"\x1b[2Ja\x1b]0;x\x07b\x9bc\x7fd\u202ee\x0d"
    assert printable("d\N{LATIN SMALL LETTER E WITH ACUTE}j\N{ZERO WIDTH NON-JOINER}\N{GRINNING FACE}\n\t") == (
        "d\N{LATIN SMALL LETTER E WITH ACUTE}j\N{ZERO WIDTH NON-JOINER}\N{GRINNING FACE}\n\t"
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_prints_nothing_that_steers(terminal: bool) -> None:
    file = io.StringIO()
    console = SafeConsole(file=file, force_terminal=terminal, width=100, color_system=None)
    console.print(STEERING, markup=False)
    console.print(Panel(STEERING))
    table = Table("a", "b")
    table.add_row(STEERING, "1")
    table.show(console)
    assert is_clean(file.getvalue())
    assert file.getvalue().count(r"\x1b[2J") == 3


def test_json_is_safe_to_look_at_and_the_same() -> None:
    text = dump_json({STEERING: [STEERING]}, indent=1)
    assert is_clean(text)
    assert json.loads(text) == {STEERING: [STEERING]}


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_names_in_a_cache_do_not_steer(tmp_path: Path, json_flag: list[str]) -> None:
    path = build(tmp_path / "a.kpu").path

    def edit(document: dict) -> None:
        document["plan"]["classes"] = [STEERING, "b", "c"]
        document["plan"]["source"]["root"] = STEERING

    forge_document(path / "plan.json", edit)
    reseal(path)
    (path / "runs").mkdir()
    failed = [{"teacher": STEERING, "unit": 1, "reason": STEERING}]
    (path / "runs/a.json").write_text(json.dumps({"id": "a", "started": "x", "failed": failed}))
    (path / "samples" / STEERING).write_text("")
    for command in ("info", "status", "verify"):
        result = kpu(command, path, *json_flag)
        assert is_clean(result.output), command
        assert r"\x1b[2J" in result.output or r"\u001b[2J" in result.output, command
