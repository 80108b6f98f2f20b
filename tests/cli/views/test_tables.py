"""Tables: figures stay whole at every width, and go into papers and programs."""

import csv
import io

import pytest
from rich.console import Console

from cli.views.tables import Table


def wide_table() -> Table:
    table = Table("run", "kind", *(f"R2 teacher{n} global" for n in range(6)), left=2)
    for run in ("first", "second"):
        table.add_row(run, "side", *(f"{n + 1.0001:.4f}" for n in range(6)))
    return table


def shown(table: Table, width: int, *, terminal: bool) -> list[str]:
    written = io.StringIO()
    table.show(Console(file=written, width=width, force_terminal=terminal, color_system=None, legacy_windows=False))
    return written.getvalue().splitlines()


@pytest.mark.parametrize(("width", "blocks"), [(30, 6), (80, 2), (200, 1)])
def test_a_terminal_gets_as_many_blocks_as_it_needs(width: int, blocks: int) -> None:
    lines = shown(wide_table(), width, terminal=True)
    assert max(map(len, lines)) <= max(width, len("second  side  R2 teacher0 global"))
    headings = [line for line in lines if line.startswith("run ")]
    assert len(headings) == blocks and all("kind" in line for line in headings)
    text = " ".join(lines)
    assert all(text.count(f" {n + 1.0001:.4f}") == 2 for n in range(6))


def test_a_pipe_gets_every_column_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = shown(wide_table(), 80, terminal=False)
    assert len(lines) == 3
    assert lines[1].split() == ["first", "side", *(f"{n + 1.0001:.4f}" for n in range(6))]


def test_figures_end_and_names_begin_in_one_column() -> None:
    table = Table("name", "value")
    table.add_row("a [b]", "1.0")
    table.add_row("longer", "100.25")
    assert shown(table, 80, terminal=False) == ["name     value", "a [b]      1.0", "longer  100.25"]


def test_markdown_csv_and_latex_hold_every_cell() -> None:
    table = Table("run", "R2, base")
    table.add_row("a|b_1 & 50%", "0.5")
    assert table.write("markdown").splitlines() == ["| run | R2, base |", "|---|---:|", r"| a\|b_1 & 50% | 0.5 |"]
    assert list(csv.reader(io.StringIO(table.write("csv")))) == [["run", "R2, base"], ["a|b_1 & 50%", "0.5"]]
    assert table.write("latex").splitlines() == [
        r"\begin{tabular}{lr}", r"\toprule", r"run & R2, base \\", r"\midrule", r"a|b\_1 \& 50\% & 0.5 \\",
        r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip


def test_a_row_of_another_length_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="expected 2 cells, found 1"):
        Table("a", "b").add_row("1")
