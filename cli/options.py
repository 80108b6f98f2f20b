"""What the commands of `kpu-cache` have in common: arguments, and how a result is printed."""

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

from cli.console import console

CachePath = Annotated[str, typer.Argument(metavar="CACHE", help="Path or URL of a cache, such as my.kpu.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output instead of text.")]


def print_result(document: dict[str, Any], as_json: bool, show: Callable[[Console], None]) -> None:
    """Print the document as JSON, or what `show` makes of it for people."""
    if as_json:
        typer.echo(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        show(console())
