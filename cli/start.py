"""What both commands do first."""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from cache.errors import ConfigError
from cli.console import escape_unprintable
from cli.names import check_names


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            found = version("kpu")
        except PackageNotFoundError:
            found = "not installed as a distribution"
        typer.echo(f"kpu {found}, Python {sys.version.split()[0]}")
        raise typer.Exit


def start(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Prepare the streams, and see that the packages to be imported are KPU's."""
    escape_unprintable()
    try:
        check_names()
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
