"""What the commands have in common: arguments, and how a result is printed."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from cli.output import console, dump_json, printable
from cli.views.tables import FORMATS, Table
from kpu.errors import ConfigError

CachePath = Annotated[str, typer.Argument(metavar="CACHE", help="Path or URL of a cache, such as my.kpu.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output instead of text.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print tables as Markdown.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print tables as CSV.")]
Latex = Annotated[bool, typer.Option("--latex", help="Print tables as LaTeX (booktabs).")]
TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run Python that the cache, run or export names, whoever it is from.")
]


def table_format(*, as_json: bool, markdown: bool, csv: bool, latex: bool) -> str:
    """Which of `json`, `markdown`, `csv`, `latex` was asked for; `text` for none of them.

    Raises:
        ConfigError: more than one was.
    """
    asked = [name for name, wanted in zip(("json", *FORMATS), (as_json, markdown, csv, latex), strict=True) if wanted]
    if len(asked) > 1:
        raise ConfigError(f"expected at most one of --json, --markdown, --csv and --latex, found --{' --'.join(asked)}")
    return asked[0] if asked else "text"


def print_tables(tables: Sequence[Table], form: str) -> None:
    """Print tables as `text`, `markdown`, `csv` or `latex`, an empty line between two."""
    for number, table in enumerate(tables):
        if form == "text":
            table.show(console())
        else:
            typer.echo("\n" * bool(number) + printable(table.write(form)), nl=False)


def print_result(document: dict[str, Any], as_json: bool, show: Callable[[Console], None]) -> None:
    """Print the document as JSON, or what `show` makes of it for people."""
    if as_json:
        typer.echo(dump_json(document, indent=1))
    else:
        show(console())
