"""What both commands do first."""

import sys
from typing import Annotated

import typer

from cli.output import escape_unprintable
from kpu import __version__
from kpu.errors import ConfigError
from kpu.own_packages import ROOT, overwritten_packages


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kpu {__version__}, Python {sys.version.split()[0]}")
        raise typer.Exit


def start(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Prepare the streams, and check that the packages to be imported are KPU's."""
    escape_unprintable()
    if overwritten := overwritten_packages():
        name = overwritten[0]
        typer.echo(
            f"error: import name {name!r}: expected KPU's package in {ROOT / name}, found another one or none: another "
            "distribution of that name was installed over it, or removed it; install KPU in an environment of its own, "
            "as with `pipx install` or `uv tool install`, or reinstall it",
            err=True,
        )
        raise typer.Exit(ConfigError.exit_code)
