"""`kpu-cache`: make, look at, prove and mend feature caches."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from cli.failures import reported

app = typer.Typer(
    help="Extract frozen multi-teacher features into a crash-safe, compressed cache, once, and look after it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CachePath = Annotated[str, typer.Argument(metavar="CACHE", help="Path or URL of a cache, such as my.kpu.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output instead of text.")]
ConfigFile = Annotated[Path | None, typer.Option("-c", "--config", help="YAML file; flags are laid over it.")]


@app.command()
@reported
def extract(
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="Image folder, tars or Parquet: path, glob, braces or URL.")
    ] = None,
    config: ConfigFile = None,
    teacher: Annotated[
        list[str] | None, typer.Option("-t", "--teacher", metavar="NAME=MODEL", help="A teacher; may be repeated.")
    ] = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="The cache to make, continue or add to.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of the configuration, as YAML.")
    ] = None,
    executor: Annotated[str | None, typer.Option("--executor", metavar="inline|ray", help="Who computes.")] = None,
    ray_address: Annotated[str | None, typer.Option("--ray-address", help="A running Ray cluster.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and estimate; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Run every teacher over every image once and keep the features. The same command again resumes."""
    from cli.show import show_estimate
    from pipeline.config import load_config

    loaded = load_config(
        config,
        data=data,
        teachers=teacher or (),
        out=out,
        overrides=overrides or (),
        executor=executor,
        ray_address=ray_address,
    )
    if dry_run:
        from pipeline.dry_run import estimate

        with _observer(as_json) as observer:
            result = estimate(loaded, observer)
        _print(result.model_dump(mode="json"), as_json, lambda console: show_estimate(console, result))
        return
    _extract(loaded, None, as_json)


@app.command("retry-failed")
@reported
def retry_failed(cache: CachePath, as_json: Json = False) -> None:
    """Try again the units that failed in earlier runs, with the configuration of the latest run."""
    from cache.runs import latest_run
    from cache.status import status as read_status

    from cache.storage import open_storage
    from pipeline.config import validate_config

    run = latest_run(open_storage(cache))
    failed = frozenset(failure.unit for failure in read_status(cache).failed)
    if run is None or not failed:
        _print({"retried_units": 0}, as_json, lambda console: console.print("no unit has failed: nothing to retry"))
        return
    values = {**run.config, "out": os.path.abspath(cache) if "://" not in cache else cache}  # noqa: PTH100
    _extract(validate_config(values, f"{cache}/runs/{run.id}.json"), failed, as_json)


@app.command()
@reported
def status(cache: CachePath, as_json: Json = False) -> None:
    """Say how far the extraction is, what it cost in precision, which rows are masked and which units failed."""
    from cache.status import status as read_status

    from cli.show import show_status

    result = read_status(cache)
    _print(result.as_json(), as_json, lambda console: show_status(console, result))
    if not result.complete:
        raise typer.Exit(1)


@app.command()
@reported
def info(cache: CachePath, as_json: Json = False) -> None:
    """Say what a cache holds: its data, teachers, outputs, codecs and preprocessing."""
    from cache.reader import open_cache
    from cli.show import describe_cache, show_info

    described = describe_cache(open_cache(cache))
    _print(described, as_json, lambda console: show_info(console, described))


@app.command()
@reported
def verify(
    cache: CachePath,
    deep: Annotated[bool, typer.Option("--deep", help="Also run the teachers again on a sample of rows.")] = False,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows --deep computes again.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which rows --deep picks.")] = 0,
    as_json: Json = False,
) -> None:
    """Prove a cache: every unit committed, every checksum and digest right, rows equal across teachers."""
    from cache.verify import verify as prove
    from cli.show import show_verification

    report = prove(cache)
    if deep and report.ok:
        from pipeline.deep import verify_deep

        report = verify_deep(cache, report, rows=rows, seed=seed)
    _print(report.as_json(), as_json, lambda console: show_verification(console, report))
    if not report.ok:
        raise typer.Exit(1)


@app.command()
@reported
def gc(cache: CachePath, as_json: Json = False) -> None:
    """Remove temporaries of dead runs and what was put into quarantine; never anything that was published."""
    from cache.leases import collect_garbage
    from cache.reader import open_cache
    from cache.storage import open_storage
    from cli.units import human_bytes

    open_cache(cache)  # refuses what is no cache
    freed = collect_garbage(open_storage(cache), quarantine=True)
    _print({"freed_bytes": freed}, as_json, lambda console: console.print(f"freed {human_bytes(freed)}"))


def _extract(config: Any, units: frozenset[int] | None, as_json: bool) -> None:
    from cli.show import show_summary, summary_json
    from pipeline.extract import extract as run_extract

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _observer(as_json) as observer:
            summary = run_extract(config, observer, units)
    except KeyboardInterrupt:
        Console(stderr=True).print("\nstopped: committed units are safe; the same command resumes", markup=False)
        raise typer.Exit(1) from None
    _print(summary_json(summary), as_json, lambda console: show_summary(console, summary))
    if not summary.complete:
        raise typer.Exit(1)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _observer(as_json: bool) -> Any:
    from cli.progress import open_observer

    return open_observer(Console(stderr=as_json))


def _print(document: dict[str, Any], as_json: bool, show: Callable[[Console], None]) -> None:
    if as_json:
        typer.echo(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        show(Console(highlight=False))
