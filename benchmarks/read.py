"""Cached features as shuffled training batches: KPU against WebDataset, MDS and litData, and against what limits it.

    python benchmarks/read.py                          # 2,048 samples of 197 x 384 and a vector; needs 2 GB of disk
    python benchmarks/read.py --rows 512 --rounds 1    # a quick look

Everybody delivers the same: batches of standardised bf16 targets in shuffled order, from files in the page cache. Peers
hold the features as fp16, KPU with its default codec. Each way runs in a process of its own, in rounds, so that a
machine that drifts in speed drifts for all of them, and keeps the memory that it frees, as training does; figures are
medians over rounds. Beside the rate stands the
processor time of a sample, workers included. Without workers a process has one core. A peer that is not installed is
left out: `pip install litdata`; `mosaicml-streaming` 0.13 asks for older NumPy and transformers than this project is
tested with, but its reader runs with newer ones:

    pip install --no-deps mosaicml-streaming && pip install brotli python-snappy xxhash zstd catalogue
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from read_data import CHANNELS, OUTPUTS, TEACHERS, TOKENS, make, write_litdata, write_mds
from read_peers import BASE, PEERS, STEP, WAYS, Chunks, Task, standardise
from rich.console import Console
from rich.table import Table

from trainer.util.allocator import keep_freed_memory

HOME: Final = Path(__file__).parents[1] / "build/benchmark-read"
CASES: Final = {
    "maps, one process": (("global", "patch"), 0),
    "maps, two workers": (("global", "patch"), 2),
    "global, one process": (("global",), 0),
    "global, two workers": (("global",), 2),
}
_NEEDS: Final = {"MDS": "streaming", "litData": "litdata", "our Zarr by tensorstore": "tensorstore"}
app = typer.Typer(add_completion=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Option(help="Where the files are made.")] = HOME,
    rows: Annotated[int, typer.Option(help="Samples.")] = 2048,
    batch: Annotated[int, typer.Option(help="Samples a batch.")] = 256,
    epochs: Annotated[int, typer.Option(help="Epochs that are timed, after one that is not.")] = 2,
    rounds: Annotated[int, typer.Option(help="How often every way runs.")] = 3,
    case: Annotated[list[str] | None, typer.Option(help="Only these cases.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these ways.")] = None,
    one: Annotated[str, typer.Option(help="One case and way, as this script calls itself.", hidden=True)] = "",
) -> None:
    """Make the files where they are missing, time every way, and print the ratios."""
    if one:
        name, way = one.split("|")
        outputs, workers = CASES[name]
        print(json.dumps(_time(Task(folder, rows, batch, outputs, workers), way, epochs)))
        return
    ways = [way for way in only or WAYS if way not in _NEEDS or find_spec(_NEEDS[way])]
    missing = [way for way in only or WAYS if way not in ways]
    _make(folder, rows, ways)
    cases = case or list(CASES)
    found: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in itertools.product(cases, ways)}
    for _, (name, way) in itertools.product(range(rounds), found):
        command = [sys.executable, __file__, "--folder", str(folder), "--rows", str(rows), "--batch", str(batch)]
        command += ["--epochs", str(epochs), "--one", f"{name}|{way}"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{name}, {way}: {result.stderr[-3000:]}")
        found[name, way].append(json.loads(result.stdout.splitlines()[-1]))
        print(f"{name}, {way}: {found[name, way][-1]}", flush=True)
    if missing:
        print(f"not installed, left out: {', '.join(missing)}")
    for name in cases:
        _show(name, {way: runs for (other, way), runs in found.items() if other == name})
    _pin()
    _show_stages(folder, rows)
    _show_teachers(folder, rows)


def _make(folder: Path, rows: int, ways: list[str]) -> None:
    make(folder, rows)
    if "MDS" in ways and not (folder / "mds").exists():
        write_mds(folder / "mds", {o.name: np.load(folder / f"{o.name}.npy", mmap_mode="r") for o in OUTPUTS})
    if "litData" in ways and not (folder / "litdata").exists():
        write_litdata(folder / "litdata", folder, rows)


def _time(task: Task, way: str, epochs: int) -> dict[str, float]:
    """Samples a second, and bytes a sample that this process read itself (memory maps and workers do not count)."""
    torch.set_num_threads(1)
    keep_freed_memory()
    if not task.workers:
        _pin()
    batches = WAYS[way](task)
    each = task.rows // task.batch
    for _ in range(each):
        found = next(batches)
    for name, values in found.items():
        shape = (task.batch, CHANNELS) if name == "global" else (task.batch, TOKENS, CHANNELS)
        assert values.shape == shape and values.dtype == torch.bfloat16, f"{way}: {values.shape} {values.dtype}"
        assert 0.5 < values.float().std() < 3, f"{way}: {name} is not standardised"
    before, busy, begun = _bytes_read(), _busy(), perf_counter()
    for _ in range(epochs * each):
        next(batches)
    seconds, busy = perf_counter() - begun, _busy() - busy
    samples = epochs * each * task.batch
    return {"rate": samples / seconds, "busy": busy / samples, "bytes": (_bytes_read() - before) / samples}


def _pin() -> None:
    """Keep this process on one core, so that threads of a library's own do not count as a worker."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def _busy() -> float:
    """Seconds of processor time that this process and its workers have used: what a busy machine distorts least."""
    seconds = time.process_time()
    for task in Path("/proc/self/task").glob("*/children"):
        for worker in task.read_text().split():
            fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def _bytes_read() -> int:
    """What this process asked the system to read; 0 if the system does not say."""
    try:
        return int(Path("/proc/self/io").read_text().split()[1])
    except OSError:
        return 0


def _show(name: str, found: dict[str, list[dict[str, float]]]) -> None:
    median = {way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in found.items()}
    peers = [median[way] for way in PEERS if way in median]
    best = max((figures["rate"] for figures in peers), default=float("nan"))
    least = min((figures["busy"] for figures in peers), default=float("nan"))
    table = Table(title=f"{name}: shuffled batches of bf16 targets")
    for column in ("way", "samples/s", "slowest, fastest", "of best peer", "CPU us", "best peer's / own", "bytes read"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, figures in median.items():
        spread = [run["rate"] for run in found[way]]
        alone = CASES[name][1] == 0 or way not in PEERS
        table.add_row(
            way,
            f"{figures['rate']:,.0f}",
            f"{min(spread):,.0f}, {max(spread):,.0f}",
            f"{figures['rate'] / best:.2f}",
            f"{figures['busy'] * 1e6:,.0f}",
            f"{least / figures['busy']:.2f}",
            f"{figures['bytes']:,.0f}" if alone and figures["bytes"] >= 100 else "-",
        )
    Console(width=130).print(table)


def _show_stages(folder: Path, rows: int) -> None:
    """Where our time goes: each stage alone, on one core, over the same random rows."""
    from kpu import open_cache
    from kpu.shards.chunk import decode_chunk, is_intact

    torch.set_num_threads(1)
    table = Table(title="processor time of a sample in us, each stage alone")
    for column in ("output", "read", "crc32c", "decode", "cast to bf16", "sum", "Cache.read_encoded", "Corpus.fetch"):
        table.add_column(column, justify="left" if column == "output" else "right")
    cache = open_cache(folder / "zarr.kpu")
    order = np.random.default_rng(0).permutation(rows)[:256]
    for output in OUTPUTS:
        chunks, grid = Chunks(folder / "zarr.kpu", output.name), cache.teachers[BASE].grid(output.name)
        needed = order if chunks.chunk_rows == 1 else np.unique(order // chunks.chunk_rows) * chunks.chunk_rows
        read = [chunks.read(int(row)) for row in needed]
        target = np.empty((len(needed), chunks.chunk_rows, *output.shape), np.int16)
        values = torch.from_numpy(cache.read_encoded(BASE, output.name, order).values)

        def decode(read: list[bytes] = read, target: Any = target, packing: Any = grid.packing) -> None:
            for raw, place in zip(read, target, strict=True):
                decode_chunk(raw, place, packing)

        corpus = _corpus(folder, (BASE,), output.name)
        stages = [
            lambda chunks=chunks, needed=needed: [chunks.read(int(row)) for row in needed],
            lambda read=read: [is_intact(raw) for raw in read],
            decode,
            lambda values=values: standardise(values, torch.tensor(STEP), None),
        ]
        whole = [
            lambda output=output: cache.read_encoded(BASE, output.name, order),
            lambda corpus=corpus: corpus.fetch(order),
        ]
        alone = [_median(stage) / len(order) * 1e6 for stage in stages]
        both = [_median(stage) / len(order) * 1e6 for stage in whole]
        table.add_row(output.name, *(f"{x:.1f}" for x in [*alone, sum(alone), *both]))
    Console(width=120).print(table)


def _median(stage: Any, times: int = 9) -> float:
    found = []
    for _ in range(times):
        begun = time.process_time()
        stage()
        found.append(time.process_time() - begun)
    return statistics.median(found)


def _corpus(folder: Path, teachers: tuple[str, ...], *outputs: str) -> Any:
    from trainer.data.corpus import Corpus

    return Corpus([str(folder / "zarr.kpu")], dict.fromkeys(teachers, outputs), teachers[0])


def _show_teachers(folder: Path, rows: int) -> None:
    """What reading one of three teachers costs, and one output of one."""
    table = Table(title="bytes that are read for one epoch in order full")
    for column in ("what", "bytes", "of all"):
        table.add_column(column, justify="left" if column == "what" else "right")
    everything = 0
    for what, teachers, outputs in (
        ("three teachers, global and patch", TEACHERS, ("global", "patch")),
        ("one teacher, global and patch", TEACHERS[:1], ("global", "patch")),
        ("one teacher, global", TEACHERS[:1], ("global",)),
    ):
        corpus = _corpus(folder, teachers, *outputs)
        order = np.random.default_rng(0).permutation(rows)
        corpus.fetch(np.arange(rows)[:: len(order) // 16])  # opens every shard
        before = _bytes_read()
        for first in range(0, rows, 256):
            corpus.fetch(order[first : first + 256])
        size = _bytes_read() - before
        everything = everything or size
        table.add_row(what, f"{size:,}", f"{size / everything:.4f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    app()
