"""Tables whose figures are never shortened: on a terminal that is too narrow, columns go on in a second block."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Final

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

GAP: Final = 2
FORMATS: Final = ("markdown", "csv", "latex")
_LATEX: Final = str.maketrans(
    {char: f"\\{char}" for char in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    | {"^": r"\textasciicircum{}"}
)  # fmt: skip


class Table:
    """Rows of text under headings. The first `left` columns are text, and head every block; the others are figures."""

    def __init__(self, *columns: str, left: int = 1) -> None:
        self.columns, self.left = columns, left
        self.rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        """Append a row; it has as many cells as there are columns."""
        if len(cells) != len(self.columns):
            raise ValueError(f"expected {len(self.columns)} cells, found {len(cells)}")
        self.rows.append(cells)

    def show(self, console: Console) -> None:
        """Print the table in as many blocks as the terminal's width makes necessary; one where it is piped or saved."""
        for number, block in enumerate(self._blocks(console.width if console.is_terminal else None)):
            if number:
                console.print()
            lines = self._lines(block)
            console.print(Text(next(lines), style="bold"), soft_wrap=True)
            for line in lines:
                console.print(line, markup=False, highlight=False, soft_wrap=True)

    def write(self, form: str) -> str:
        """The table as `markdown`, `csv` or `latex` (a tabular of booktabs), ending in a line break."""
        if form == "csv":
            written = io.StringIO()
            csv.writer(written, lineterminator="\n").writerows([self.columns, *self.rows])
            return written.getvalue()
        if form == "latex":
            lines = [" & ".join(cell.translate(_LATEX) for cell in cells) + r" \\" for cells in self._all()]
            kinds = "l" * self.left + "r" * (len(self.columns) - self.left)
            begin, end = rf"\begin{{tabular}}{{{kinds}}}", r"\end{tabular}"
            return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", end, ""])
        rows = ["| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in self._all()]
        rule = "|" + "|".join("---" if at < self.left else "---:" for at in range(len(self.columns))) + "|"
        return "\n".join([rows[0], rule, *rows[1:], ""])

    def _all(self) -> list[tuple[str, ...]]:
        return [self.columns, *self.rows]

    def _width(self, column: int) -> int:
        return max(cell_len(cells[column]) for cells in self._all())

    def _blocks(self, width: int | None) -> list[list[int]]:
        """Numbers of the columns of each block; the first `left` are in all of them."""
        heading = list(range(self.left))
        blocks, used = [list(heading)], 0
        begin = sum(self._width(column) + GAP for column in heading)
        used = begin
        for column in range(self.left, len(self.columns)):
            needed = self._width(column) + GAP
            if width is not None and used + needed - GAP > width and len(blocks[-1]) > self.left:
                blocks.append(list(heading))
                used = begin
            blocks[-1].append(column)
            used += needed
        return blocks

    def _lines(self, block: Sequence[int]) -> Iterator[str]:
        widths = {column: self._width(column) for column in block}
        for cells in self._all():
            padded = (_pad(cells[column], widths[column], left=column < self.left) for column in block)
            yield (" " * GAP).join(padded).rstrip()


def _pad(text: str, width: int, *, left: bool) -> str:
    blank = " " * (width - cell_len(text))
    return text + blank if left else blank + text
