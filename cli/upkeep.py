"""The commands of `kpu-cache` that look at a cache, prove it, mend it and clean up."""

from typing import Annotated

import typer

from cli.failures import reported
from cli.options import CachePath, Json, TrustCode, print_result
from cli.output import progress_bar
from kpu.errors import ConfigError


@reported()
def status(cache: CachePath, as_json: Json = False) -> None:
    """Say how far the extraction is, what it cost in precision, which rows are masked and which units failed.

    Exits with 1 where units are left to do.
    """
    from cli.views.show import show_status
    from kpu.tools.status import status as read_status

    result = read_status(cache)
    print_result(result.as_json(), as_json, lambda console: show_status(console, result))
    if not result.complete:
        raise typer.Exit(1)


@reported()
def info(cache: CachePath, as_json: Json = False) -> None:
    """Say what a cache holds: its data, teachers, outputs, codecs and preprocessing."""
    from cli.views.show import describe_cache, show_info
    from kpu.reading.cache import open_cache

    described = describe_cache(open_cache(cache))
    print_result(described, as_json, lambda console: show_info(console, described))


@reported()
def verify(
    cache: CachePath,
    deep: Annotated[bool, typer.Option("--deep", help="Also run the teachers again on a sample of rows.")] = False,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows --deep computes again.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which rows --deep picks.")] = 0,
    images: Annotated[
        str | None, typer.Option("--images", metavar="DIR", help="Where the images of --deep are, if they moved.")
    ] = None,
    trust_code: TrustCode = False,
    as_json: Json = False,
) -> None:
    """Prove a cache: every unit committed, every checksum and digest right, rows equal across teachers.

    Reads every byte, lists all problems, and exits with 1 if there is one. --deep looks further where there is none.
    """
    from cli.views.show import show_verification
    from kpu.tools.verify import verify as prove

    if images is not None and not deep:
        raise ConfigError(f"--images {images}: expected with --deep, which alone reads images; add it, or leave it out")
    with progress_bar("verify") as progress:
        report = prove(cache, progress=progress)
    again = 0
    if deep and report.ok:
        from kpu.trust.list import load_trust
        from pipeline.verify_deep import verify_deep

        trust = load_trust(everything=trust_code)
        report, again = verify_deep(cache, report, rows=rows, seed=seed, images=images, trust=trust)
    print_result(report.as_json(), as_json, lambda console: show_verification(console, cache, report, again))
    if not report.ok:
        raise typer.Exit(1)


@reported()
def repair(
    cache: CachePath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be withdrawn; change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Verify a cache and withdraw its damaged units, so that the command that made it does them again.

    Nothing is deleted: records are moved into quarantine, which gc empties. Exits with 1 where work or damage is left.
    """
    from cli.views.show import show_repair
    from kpu.tools.repair import repair as mend

    with progress_bar("verify") as progress:
        repaired = mend(cache, dry_run=dry_run, progress=progress)
    print_result(repaired.as_json(), as_json, lambda console: show_repair(console, cache, repaired, dry_run))
    if not repaired.report.ok:
        raise typer.Exit(1)


@reported()
def bench(
    cache: CachePath,
    teacher: Annotated[
        list[str] | None, typer.Option("-t", "--teacher", metavar="NAME", help="Only this one; may be repeated.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows are read.")] = 1024,
    as_json: Json = False,
) -> None:
    """Measure how fast the cache reads here, and what other codecs would make of its features. Changes nothing."""
    from cli.views.bench import show_bench
    from kpu.tools.bench import bench as run_bench

    with progress_bar("bench") as progress:
        result = run_bench(cache, teachers=teacher or (), rows=rows, progress=progress)
    print_result(result.as_json(), as_json, lambda console: show_bench(console, result))


@reported()
def gc(cache: CachePath, as_json: Json = False) -> None:
    """Remove what dead runs left half written, and what was put into quarantine; never anything that is committed."""
    from cli.views.units import human_bytes
    from kpu.records.plan import not_a_cache
    from kpu.storage import paths
    from kpu.storage.leases import collect_garbage
    from kpu.storage.open import open_storage

    storage = open_storage(cache)
    if storage.size(paths.PLAN) is None and storage.size(paths.TEACHERS) is None:
        raise not_a_cache(storage.url)
    freed = collect_garbage(storage, quarantine=True)
    print_result({"freed_bytes": freed}, as_json, lambda console: console.print(f"freed {human_bytes(freed)}"))
