"""`kpu-cache`: make, look at, prove and mend feature caches."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from cli.failures import reported
from cli.options import CachePath, Json, TrustCode, print_result
from cli.output import console
from cli.start import start
from cli.upkeep import bench, gc, info, repair, status, verify

if TYPE_CHECKING:
    from kpu.trust.list import Trust

    # these load torch and pyarrow, which takes seconds: help and usage errors should not wait for them
    from pipeline.config import ExtractConfig
    from pipeline.run.records import RunSummary

app = typer.Typer(
    help="Extract frozen multi-teacher features into a crash-safe, compressed cache, once, and look after it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Executor = Annotated[str | None, typer.Option("--executor", metavar="inline|ray", help="Who computes.")]
RayAddress = Annotated[str | None, typer.Option("--ray-address", help="A running Ray cluster.")]
ConfigFile = Annotated[Path | None, typer.Option("-c", "--config", help="YAML file; flags are laid over it.")]
_RESUMES: Final = "committed units are safe; the same command resumes"
_AGAIN: Final = "what was committed is safe; run the same command again"


app.callback()(start)


@app.command(
    epilog="Example: kpu-cache extract images/ -o my.kpu -t dino=timm:vit_small_patch14_dinov2.lvd142m "
    "--set teachers.dino.input.size=224"
)
@reported(_RESUMES)
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
    executor: Executor = None,
    ray_address: RayAddress = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and estimate; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Run every teacher over every image once and keep the features. The same command again resumes.

    Exits with 0 if the cache is complete, with 1 where units are left, with 2 where it could not start.
    """
    from cli.views.progress import open_observer
    from cli.views.show import show_estimate, show_extraction, summary_json
    from pipeline.config import load_config
    from pipeline.recorded import data_of

    loaded = load_config(
        config,
        planned=data_of,
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
        print_result(result.model_dump(mode="json"), as_json, lambda console: show_estimate(console, result))
        return
    summary = _extract(loaded, None, as_json)
    print_result(summary_json(summary), as_json, lambda console: show_extraction(console, summary))
    if not summary.complete:
        raise typer.Exit(1)


@app.command("retry-failed", epilog="Example: kpu-cache retry-failed my.kpu")
@reported(_RESUMES)
def retry_failed(
    cache: CachePath,
    config: Annotated[
        Path | None,
        typer.Option("-c", "--config", help="YAML file to use instead of the cache's own records."),
    ] = None,
    executor: Executor = None,
    ray_address: RayAddress = None,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Try again the units that failed, with the teachers as the cache records them, or as a configuration says.

    It runs here; --executor ray spreads it.
    """
    from cli.views.show import show_extraction, summary_json
    from kpu.trust.list import load_trust
    from pipeline.config import load_config
    from pipeline.retry import failed_runs, retry_configs, with_executor

    runs = failed_runs(cache)
    summaries = []
    if config is not None and runs:
        named = load_config(config, out=cache, executor=executor, ray_address=ray_address)
        summaries.append(_extract(named, frozenset[int]().union(*(units for _, units in runs)), as_json))
    else:
        trust = load_trust(everything=trust_code)
        for run, units in runs:
            for found in retry_configs(cache, run):
                again = with_executor(found, executor, ray_address)
                summaries.append(_extract(again, units, as_json, trust))
    document = {"retried_units": sum(len(units) for _, units in runs), "runs": [summary_json(s) for s in summaries]}

    def show(console: Console) -> None:
        for summary in summaries:
            show_extraction(console, summary)
        if not summaries:
            console.print("no unit has failed: nothing to retry")

    print_result(document, as_json, show)
    if not all(summary.complete for summary in summaries):
        raise typer.Exit(1)


for command, example in (
    (status, "kpu-cache status my.kpu"),
    (info, "kpu-cache info my.kpu --json"),
    (verify, "kpu-cache verify my.kpu --deep --rows 256"),
    (repair, "kpu-cache repair my.kpu --dry-run"),
    (bench, "kpu-cache bench my.kpu -t dino"),
    (gc, "kpu-cache gc my.kpu"),
):
    app.command(epilog=f"Example: {example}")(command)


@app.command("export", epilog="Example: kpu-cache export my.kpu my-tars.kpu --format webdataset")
@reported(_AGAIN)
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
    gives a split of a dataset for Theia; if interrupted it starts again, and once complete it is never written again.
    """
    from cli.convert import export_cache, show_conversion

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
    print_result(asdict(done), as_json, lambda console: show_conversion(console, done))


@app.command("import", epilog="Example: kpu-cache import theia/ my.kpu --dataset imagenet --split train")
@reported(_AGAIN)
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

    done = import_cache(root, out, dataset=dataset, split=split, codec=codec, shards=shards)
    print_result(asdict(done), as_json, lambda console: show_import(console, done))


def _extract(
    config: "ExtractConfig", units: frozenset[int] | None, as_json: bool, trust: "Trust | None" = None
) -> "RunSummary":
    from cli.views.progress import open_observer
    from pipeline.extract import extract as run_extract

    with open_observer(console(stderr=as_json)) as observer:
        return run_extract(config, observer, units, trust=trust)
