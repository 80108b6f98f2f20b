"""`kpu-train`: train students from feature caches, measure and export them."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cli.console import console, escape_unprintable
from cli.failures import reported

if TYPE_CHECKING:  # these load torch, which takes seconds: help and usage errors should not wait for it
    from trainer.config import TrainConfig

app = typer.Typer(
    help="Train one student that inherits what all teachers of a feature cache know; no teacher is loaded.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path | None, typer.Option("-c", "--config", help="YAML file; flags are laid over it.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of the configuration, as YAML: optim.lr=3e-4."),
]
Caches = Annotated[list[str] | None, typer.Option("--cache", metavar="PATH", help="A cache; may be repeated.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The folder of the run.")]


@app.callback()
def _start() -> None:
    escape_unprintable()


@app.command()
@reported
def fit(
    out: Out,
    config: ConfigFile = None,
    cache: Caches = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was interrupted.")] = False,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Training processes, by Ray Train.")] = None,
    ray_address: Annotated[str | None, typer.Option("--ray-address", help="A running Ray cluster.")] = None,
) -> None:
    """Train a student. With --resume the same command goes on from the last checkpoint, sample for sample."""
    from trainer.config import load_config

    extra = [f"workers={workers}"] if workers is not None else []
    loaded = load_config(config, caches=cache or (), overrides=[*(overrides or ()), *extra])
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        summary = _fit(loaded, out.absolute(), resume, ray_address)
    except KeyboardInterrupt:
        console(stderr=True).print("stopped: the last checkpoint is safe; the same command with --resume goes on")
        raise typer.Exit(1) from None
    from cli.training import show_summary

    show_summary(console(), out, summary)


def _fit(config: "TrainConfig", out: Path, resume: bool, ray_address: str | None) -> dict[str, Any]:
    from cli.training import watching

    with watching(console()) as watch:
        from trainer.loop import fit as run_fit

        return run_fit(config, out, resume=resume, watch=watch).summary


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt
