"""What `kpu-cache export` and `import` do, and what they print."""

import secrets
from pathlib import Path
from typing import Any

from rich.console import Console

from cli.output import progress_bar, say
from cli.views.units import human_bytes, plural
from kpu.errors import ConfigError, KpuError
from kpu.format.teacher import CodecSpec, ShardFormat
from kpu.interop.convert import Conversion, convert
from kpu.interop.theia.export import TheiaExport, export_theia
from kpu.interop.theia.imported import TheiaImport, import_theia
from kpu.storage.open import location_exists
from pipeline.paths import absolute
from pipeline.planning import choose_unit_rows
from pipeline.target import cleanup_on_failure, existing_plan

_CODECS = ("uniform", "rotated", "bf16", "fp16", "fp32")


def export_cache(
    cache: str,
    out: str,
    *,
    shards: str,
    teachers: list[str],
    dequantise: bool,
    dataset: str | None,
    split: str | None,
    images: str | None,
) -> Conversion | TheiaExport:
    """Write a cache in another format; the options are those of the command.

    Raises:
        ConfigError: an option is unknown, or of no use to this format.
        KpuError: as `convert` and `export_theia`.
    """
    if shards == "theia":
        _refuse(shards, dequantise=dequantise)
        with progress_bar("export") as progress:
            return export_theia(
                cache,
                absolute(out),
                dataset=dataset or Path(cache.rstrip("/")).stem,
                split=split or "train",
                teachers=teachers,
                images=None if images is None else absolute(images),
                progress=progress,
            )
    _refuse(shards, dataset=dataset, split=split, images=images)
    place, kind = absolute(out), _shard_format(shards, "zarr, webdataset or theia")
    existing_plan(place)
    try:
        with progress_bar("export") as progress, cleanup_on_failure(place) as created:
            return convert(
                cache,
                place,
                shards=kind,
                run=_new_run("export"),
                teachers=teachers,
                dequantise=dequantise,
                progress=progress,
                created=created,
            )
    except KpuError as error:
        if location_exists(place):
            error.add_note(f"what was exported so far is in {place}, and the same command goes on from there")
        raise


def import_cache(root: str, out: str, *, dataset: str, split: str, codec: str, shards: str) -> TheiaImport:
    """Take a dataset of Theia's in; the options are those of the command.

    Raises:
        ConfigError: an option is unknown.
        KpuError: as `import_theia`.
    """
    if codec not in _CODECS:
        raise ConfigError(f"codec: expected one of {', '.join(_CODECS)}, found {codec!r}")
    place, kind = absolute(out), _shard_format(shards, "zarr or webdataset")
    existing_plan(place)
    with progress_bar("import") as progress, cleanup_on_failure(place) as created:
        return import_theia(
            absolute(root),
            place,
            dataset=dataset,
            split=split,
            codec=CodecSpec.model_validate({"name": codec}),
            shards=kind,
            run=_new_run("import"),
            unit_rows=choose_unit_rows,
            progress=progress,
            created=created,
        )


def show_conversion(console: Console, done: Conversion | TheiaExport) -> None:
    """Say what was written, for people."""
    if isinstance(done, TheiaExport):
        masked = f", {plural(done.masked, 'masked row')} left out" if done.masked else ""
        say(console, f"exported: {plural(done.samples, 'sample')} of {', '.join(done.teachers)}{masked}")
        if done.sizes > 1:
            say(
                console,
                f"the images have {done.sizes:,} sizes: give Theia's loader an image_transform that makes them equal",
            )
        say(console, f"complete: {done.folder}, split {done.split}")
        return
    existing = f", {done.existing:,} existed already" if done.existing else ""
    say(console, f"exported: {plural(done.converted, 'unit')} of {', '.join(done.teachers)}{existing}")
    if done.unfinished:
        names = ", ".join(done.unfinished)
        say(
            console,
            f"done, {human_bytes(done.bytes)} written; {done.out} also holds {names}, which an earlier export left "
            "incomplete: export that again as well",
        )
        return
    say(console, f"complete: {done.out}, {human_bytes(done.bytes)} written")


def show_import(console: Console, done: TheiaImport) -> None:
    """Say what was taken in, for people."""
    masked = f", {plural(done.masked, 'row')} masked" if done.masked else ""
    say(console, f"imported: {plural(done.samples, 'sample')} of {', '.join(done.teachers)}{masked}")
    say(console, f"complete: {done.out}")


def _refuse(shards: str, **options: Any) -> None:
    for name, value in options.items():
        if value:
            raise ConfigError(f"{name}: format {shards} has no use for it; leave it out, or choose another --format")


def _shard_format(name: str, expected: str) -> ShardFormat:
    if name == "zarr":
        return "zarr"
    if name == "webdataset":
        return "webdataset"
    raise ConfigError(f"format: expected {expected}, found {name!r}")


def _new_run(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(8)}"
