"""`kpu-cache`: make, look at, prove and mend feature caches."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from cli.console import console, escape_unprintable, progress_bar
from cli.failures import reported

if TYPE_CHECKING:  # these load torch and pyarrow, which takes seconds: help and usage errors should not wait for them
    from pipeline.config import ExtractConfig
    from pipeline.runs import RunSummary

app = typer.Typer(
    help="Extract frozen multi-teacher features into a crash-safe, compressed cache, once, and look after it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CachePath = Annotated[str, typer.Argument(metavar="CACHE", help="Path or URL of a cache, such as my.kpu.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output instead of text.")]
ConfigFile = Annotated[Path | None, typer.Option("-c", "--config", help="YAML file; flags are laid over it.")]


@app.callback()
def _start() -> None:
    escape_unprintable()


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
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of the configuration, as YAML: codec.step=0.1."),
    ] = None,
    executor: Annotated[str | None, typer.Option("--executor", metavar="inline|ray", help="Who computes.")] = None,
    ray_address: Annotated[str | None, typer.Option("--ray-address", help="A running Ray cluster.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and estimate; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Run every teacher over every image once and keep the features. The same command again resumes.

    Exits with 0 where the cache is complete, with 1 where units are left, with 2 where it could not start.
    """
    from cli.progress import open_observer
    from cli.show import show_estimate, show_summary, summary_json
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

        with open_observer(console(stderr=as_json)) as observer:
            result = estimate(loaded, observer)
        _print(result.model_dump(mode="json"), as_json, lambda console: show_estimate(console, result))
        return
    summary = _extract(loaded, None, as_json)
    _print(summary_json(summary), as_json, lambda console: show_summary(console, summary))
    if not summary.complete:
        raise typer.Exit(1)


@app.command("retry-failed")
@reported
def retry_failed(cache: CachePath, as_json: Json = False) -> None:
    """Try again the units that failed, each with the configuration of the latest run in which it failed."""
    from cli.show import show_summary, summary_json
    from pipeline.config import validate_config
    from pipeline.paths import absolute
    from pipeline.retry import failed_runs

    out = absolute(cache)
    runs = failed_runs(cache)
    summaries = []
    for run, units in runs:
        config = validate_config({**run.config, "out": out}, f"{cache}/runs/{run.id}.json")
        summaries.append(_extract(config, units, as_json))
    document = {"retried_units": sum(len(units) for _, units in runs), "runs": [summary_json(s) for s in summaries]}

    def show(console: Console) -> None:
        for summary in summaries:
            show_summary(console, summary)
        if not summaries:
            console.print("no unit has failed: nothing to retry")

    _print(document, as_json, show)
    if not all(summary.complete for summary in summaries):
        raise typer.Exit(1)


@app.command()
@reported
def status(cache: CachePath, as_json: Json = False) -> None:
    """Say how far the extraction is, what it cost in precision, which rows are masked and which units failed.

    Exits with 1 where units are left to do.
    """
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
    images: Annotated[
        str | None, typer.Option("--images", metavar="DIR", help="Where the images of --deep are, if they moved.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove a cache: every unit committed, every checksum and digest right, rows equal across teachers.

    Reads every byte, lists all problems, and exits with 1 if there is one. --deep looks further where there is none.
    """
    from cache.errors import ConfigError
    from cache.verify import verify as prove
    from cli.show import show_verification

    if images is not None and not deep:
        raise ConfigError(f"--images {images}: expected with --deep, which alone reads images; add it, or leave it out")
    with progress_bar("verify") as progress:
        report = prove(cache, progress=progress)
    again = 0
    if deep and report.ok:
        from pipeline.deep import verify_deep

        report, again = verify_deep(cache, report, rows=rows, seed=seed, images=images)
    _print(report.as_json(), as_json, lambda console: show_verification(console, cache, report, again))
    if not report.ok:
        raise typer.Exit(1)


@app.command()
@reported
def repair(
    cache: CachePath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be withdrawn; change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Verify a cache and withdraw its damaged units, so that the command that made it does them again.

    Nothing is deleted: records are moved into quarantine, which gc empties. Exits with 1 where work or damage is left.
    """
    from cache.repair import repair as mend
    from cli.show import show_repair

    with progress_bar("verify") as progress:
        repaired = mend(cache, dry_run=dry_run, progress=progress)
    _print(repaired.as_json(), as_json, lambda console: show_repair(console, cache, repaired, dry_run))
    if not repaired.report.ok:
        raise typer.Exit(1)


@app.command()
@reported
def bench(
    cache: CachePath,
    teacher: Annotated[
        list[str] | None, typer.Option("-t", "--teacher", metavar="NAME", help="Only this one; may be repeated.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows are read.")] = 1024,
    as_json: Json = False,
) -> None:
    """Measure how fast the cache reads here, and what other codecs would make of its features. Changes nothing."""
    from cache.bench import bench as run_bench
    from cli.bench import show_bench

    with progress_bar("bench") as progress:
        result = run_bench(cache, teachers=teacher or (), rows=rows, progress=progress)
    _print(result.as_json(), as_json, lambda console: show_bench(console, result))


@app.command()
@reported
def gc(cache: CachePath, as_json: Json = False) -> None:
    """Remove what dead runs left half written, and what was put into quarantine; never anything that was published."""
    from cache import layout
    from cache.errors import NotACacheError
    from cache.leases import collect_garbage
    from cache.locations import open_storage
    from cli.units import human_bytes

    storage = open_storage(cache)
    if storage.size(layout.PLAN) is None and storage.size(layout.TEACHERS) is None:
        raise NotACacheError(f"{storage.url}: expected a cache, found no {layout.PLAN}; check the path")
    freed = collect_garbage(storage, quarantine=True)
    _print({"freed_bytes": freed}, as_json, lambda console: console.print(f"freed {human_bytes(freed)}"))


@app.command("export")
@reported
def export_command(
    cache: CachePath,
    out: Annotated[str, typer.Argument(metavar="OUT", help="A new cache; for theia the folder of datasets.")],
    shards: Annotated[
        str, typer.Option("--format", metavar="zarr|webdataset|theia", help="What to write.")
    ] = "webdataset",
    teacher: Annotated[
        list[str] | None, typer.Option("-t", "--teacher", metavar="NAME", help="A teacher; may be repeated.")
    ] = None,
    dequantise: Annotated[bool, typer.Option("--dequantise", help="Store decoded float32 values.")] = False,
    dataset: Annotated[str | None, typer.Option("--dataset", help="theia: its name; the cache's without this.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="theia: the split; train without this.")] = None,
    images: Annotated[str | None, typer.Option("--images", help="theia: where the images are, if they moved.")] = None,
    as_json: Json = False,
) -> None:
    """Write a complete cache in another format; all its teachers, or those named.

    zarr and webdataset give a cache with the same plan, stored values and masks; the same command again resumes. theia
    gives a split of a dataset for Theia; if interrupted it is begun anew, and once it stands it is never written again.
    """
    from cli.convert import export_cache, show_export

    with _interruptible():
        done = export_cache(
            cache,
            out,
            shards=shards,
            teachers=teacher or [],
            dequantise=dequantise,
            dataset=dataset,
            split=split,
            images=images,
        )
    _print(asdict(done), as_json, lambda console: show_export(console, done))


@app.command("import")
@reported
def import_command(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="The folder of Theia's datasets.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The cache to make.")],
    dataset: Annotated[str, typer.Option("--dataset", help="Which dataset below ROOT.")],
    split: Annotated[str, typer.Option("--split", help="Which of its splits.")],
    codec: Annotated[
        str, typer.Option("--codec", metavar="uniform|rotated|bf16|fp16|fp32", help="How to store.")
    ] = "uniform",
    shards: Annotated[str, typer.Option("--format", metavar="zarr|webdataset", help="The cache's shards.")] = "zarr",
    as_json: Json = False,
) -> None:
    """Take a feature dataset of Theia's in as a cache, with its images as the source. The same command again resumes.

    Checks keys, shapes, files and values of every column first, and names the tar and member that is wrong.
    """
    from cli.convert import import_cache, show_import

    with _interruptible():
        done = import_cache(root, out, dataset=dataset, split=split, codec=codec, shards=shards)
    _print(asdict(done), as_json, lambda console: show_import(console, done))


@contextmanager
def _interruptible() -> Iterator[None]:
    """End by an interruption, or by SIGTERM, with a message and exit code 1."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        console(stderr=True).print("stopped: what was committed is safe; run the same command again")
        raise typer.Exit(1) from None


def _extract(config: "ExtractConfig", units: frozenset[int] | None, as_json: bool) -> "RunSummary":
    from cli.progress import open_observer
    from pipeline.extract import extract as run_extract

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with open_observer(console(stderr=as_json)) as observer:
            return run_extract(config, observer, units)
    except KeyboardInterrupt:
        console(stderr=True).print("stopped: committed units are safe; the same command resumes")
        raise typer.Exit(1) from None


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _print(document: dict[str, Any], as_json: bool, show: Callable[[Console], None]) -> None:
    if as_json:
        typer.echo(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        show(console())
