"""`kpu-train`: train students from feature caches, measure and export them."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.failures import reported
from cli.options import Csv, Json, Latex, Markdown, TrustCode, print_tables, table_format
from cli.output import console, dump_json, progress_bar, progress_note, say
from cli.start import start
from kpu.errors import IncompleteError

if TYPE_CHECKING:
    from kpu.trust.list import Trust
    from trainer.config import TrainConfig

    # these load torch, which takes seconds: help and usage errors should not wait for it
    from trainer.loop.batches import Live

app = typer.Typer(
    help="Train one student that inherits what all teachers of a feature cache know; no teacher is loaded.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path | None, typer.Option("-c", "--config", help="YAML file; flags are laid over it.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of the configuration, as YAML: optim.lr=3e-4."),
]
Caches = Annotated[list[str] | None, typer.Option("--cache", metavar="PATH", help="A cache; may be repeated.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The folder of the run.")]


app.callback()(start)


def _after_fit(options: Mapping[str, Any]) -> str:
    out: Path = options["out"]
    if next((out / "checkpoints").glob("step-*"), None) is not None:
        return "the last checkpoint is safe; the same command with --resume goes on"
    if (out / "config.yaml").exists():
        return "there is no checkpoint yet; the same command with --resume begins from the start"
    return "no run was begun"


@app.command(epilog="Example: kpu-train fit -c train.yaml -o runs/first --set optim.epochs=40")
@reported(_after_fit)
def fit(
    out: Out,
    config: ConfigFile = None,
    cache: Caches = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was interrupted.")] = False,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Training processes, by Ray Train.")] = None,
    ray_address: Annotated[str | None, typer.Option("--ray-address", help="A running Ray cluster.")] = None,
    trust_code: TrustCode = False,
) -> None:
    """Train a student. With --resume the same command goes on from the last checkpoint, sample for sample.

    `kpu-train fit -o RUN --resume` needs no more than that: the run knows how it was begun.
    """
    from trainer.config import load_config
    from trainer.run.place import CONFIG, check_place, require_run

    if os.environ.get("RANK", "0") == "0":
        (require_run if resume else check_place)(out.absolute())
    extra = [f"workers={workers}"] if workers is not None else []
    resolved = resume and config is None
    if resolved:
        config = out / CONFIG  # a run knows how it was begun
    assigned = [*(overrides or ()), *extra]
    loaded = load_config(config, caches=cache or (), overrides=assigned, resolved=resolved)
    summary = _fit(loaded, out.absolute(), resume, ray_address, _trust(loaded, trust_code, named=not resolved))
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several of this command
        from cli.views.training import show_fitted

        show_fitted(console(), out, summary)


@app.command(epilog="Example: kpu-train ablate -c sweep.yaml --csv")
@reported("trainings that ended are kept; the same command goes on")
def ablate(
    sweep: Annotated[Path, typer.Option("-c", "--config", metavar="SWEEP.yaml", help="What to vary.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Replaces `out` of the file.")] = None,
    ray_address: Annotated[str | None, typer.Option("--ray-address", help="A running Ray cluster.")] = None,
    trust_code: TrustCode = False,
    as_json: Json = False,
    markdown: Markdown = False,
    csv: Csv = False,
    latex: Latex = False,
) -> None:
    """Train one student for every cell of a grid and every seed, by Ray Tune; trainings that ended are not repeated.

    Ends with a table of paired differences from the first cell.
    """
    progress_note(f"open: {sweep}")
    from cli.views.training import ablation_table
    from kpu.trust.code import naming_models
    from kpu.trust.list import load_trust
    from trainer.sweep.ablate import ablate as run_sweep
    from trainer.sweep.sweeps import load_sweep

    form = table_format(as_json=as_json, markdown=markdown, csv=csv, latex=latex)
    loaded = load_sweep(sweep, out)
    trust = naming_models(load_trust(everything=trust_code), *(trial.config.student.model for trial in loaded.trials))
    tell = partial(say, console(stderr=True))
    found = run_sweep(loaded, address=ray_address, tell=tell, trust=trust)
    if form == "json":
        typer.echo(dump_json(found.as_json()))
        return
    print_tables([ablation_table(found)], form)
    if form == "text":
        say(console(), f"kept in {found.out}")


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that ended.")]
Images = Annotated[
    str | None, typer.Option("--images", metavar="PATH", help="Where the images of the cache are now, if they moved.")
]


@app.command(name="eval", epilog="Example: kpu-train eval runs/first --cache test.kpu")
@reported()
def evaluate(
    run: RunPath,
    cache: Caches = None,
    images: Images = None,
    same_labels: Annotated[
        bool,
        typer.Option("--same-labels", help="Equal labels mean the same in all caches, whatever their classes."),
    ] = False,
    trust_code: TrustCode = False,
    as_json: Json = False,
    markdown: Markdown = False,
    csv: Csv = False,
    latex: Latex = False,
) -> None:
    """Measure a student beside the frozen base and each teacher; by default on the validation rows of its own caches.

    The result is kept with the run, for `compare`.
    """
    form = table_format(as_json=as_json, markdown=markdown, csv=csv, latex=latex)
    from kpu.trust.list import load_trust
    from trainer.run.place import require_run

    require_run(run)
    progress_note(f"open: {run}")
    from trainer.evaluation.evaluate import evaluate as measure

    with progress_bar("rows") as progress:
        trust = load_trust(everything=trust_code)
        found = measure(
            run,
            cache or (),
            images=images,
            progress=progress,
            trust=trust,
            phase=progress_note,
            same_labels=same_labels,
        )
    if form == "json":
        typer.echo(dump_json(found))
    else:
        from cli.views.evaluation import evaluated_rows, evaluation_tables

        if form == "text":
            say(console(), evaluated_rows(found))
        print_tables(evaluation_tables(found), form)
        _notes(found["notes"], form)
    if "unkept" in found:
        raise IncompleteError(f"what was measured could not be kept with the run, for `compare`: {found['unkept']}")


@app.command(epilog="Example: kpu-train export runs/first -o student")
@reported()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Option("-o", "--out", help="A folder that does not exist yet.")],
    bundle: Annotated[
        bool | None, typer.Option("--bundle/--no-bundle", help="Put the base's weights in; by default below 2 GB.")
    ] = None,
    images: Images = None,
    program: Annotated[bool, typer.Option("--program/--no-program", help="Write student.pt2, by torch.export.")] = True,
    trust_code: TrustCode = False,
) -> None:
    """Write the student as its user runs it, on images; first its features are compared with those from the cache."""
    from trainer.run.place import require_nothing, require_run

    require_run(run)
    require_nothing(out)
    progress_note(f"open: {run}")
    from cli.views.evaluation import show_exported_student
    from kpu.trust.list import load_trust
    from trainer.export.export import export as write

    progress_note("check: the student on images against the cache; then write it")
    trust = load_trust(everything=trust_code)
    show_exported_student(console(), write(run, out, bundle=bundle, images=images, program=program, trust=trust))


@app.command(epilog="Example: kpu-train compare runs/* --plot runs.svg --markdown")
@reported()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs that ended.")],
    cache: Caches = None,
    plot: Annotated[Path, typer.Option("--plot", help="Where to draw them.")] = Path("compare.png"),
    as_json: Json = False,
    markdown: Markdown = False,
    csv: Csv = False,
    latex: Latex = False,
) -> None:
    """Put runs side by side: a table, and a plot. With --cache, what `eval` found on that cache."""
    form = table_format(as_json=as_json, markdown=markdown, csv=csv, latex=latex)
    from trainer.run.place import require_run

    for run in runs:
        require_run(run)
    from trainer.evaluation.compare import compare as read
    from trainer.evaluation.compare import plot as draw

    found = read(runs, cache or ())
    if form == "json":
        typer.echo(dump_json([each.as_json() for each in found]))
    else:
        from cli.views.evaluation import comparison_notes, comparison_table

        print_tables([comparison_table(found)], form)
        _notes(comparison_notes(found), form)
    draw(found, plot)
    if form == "text":
        say(console(), f"drawn: {plot}")


def _notes(notes: Sequence[str], form: str) -> None:
    """Print notes below a table; beside one that a program reads, on standard error."""
    for note in notes:
        say(console(stderr=form != "text"), f"note: {note}")


def _trust(config: "TrainConfig", everything: bool, *, named: bool) -> "Trust":
    """Which code may run: of the student's, too, where the user `named` it, and not a run."""
    from kpu.trust.code import naming_models
    from kpu.trust.list import load_trust

    trust = load_trust(everything=everything)
    return naming_models(trust, config.student.model) if named else trust


def _fit(config: "TrainConfig", out: Path, resume: bool, ray_address: str | None, trust: "Trust") -> dict[str, Any]:
    from cli.views.training import watching

    if os.environ.get("RANK", "0") == "0":
        from trainer.run.start import check_resumed, check_start

        if resume:
            check_resumed(out, config)
        check_start(config)
        say(console(), f"open: {', '.join(config.caches)}")  # torch and the caches take seconds from here on
    with watching(console()) as watch:
        from trainer.loop.world import under_launcher

        live: Live | None = None
        if config.targets.source == "live":
            from cli.live import run_teachers  # the only way by which teachers come into a training

            live = partial(run_teachers, trust=trust)
        if (config.workers > 1 or ray_address) and not under_launcher():
            from trainer.ray_train import fit_with_ray

            return fit_with_ray(config, out, resume=resume, address=ray_address, watch=watch, live=live, trust=trust)
        from trainer.loop.fit import fit as run_fit

        return run_fit(config, out, resume=resume, watch=watch, live=live, trust=trust).summary


if __name__ == "__main__":  # torchrun -m cli.train
    app()
