"""A training step on cached targets against one on resident targets, and against one that runs the teachers.

    python benchmarks/train.py time                 # three ViT-S teachers, a ViT-Ti student and two side students
    python benchmarks/train.py time --device cuda --batch 256
    python benchmarks/train.py busy                 # a side student on CIFAR maps, batch 256, cached against resident
    python benchmarks/train.py busy --device cuda --steps 38 --rows 50000

Each variant of `time` and `busy` runs in a process of its own, in rounds, so that a machine that drifts in speed drifts
for all of them; the figures are medians over rounds. `resident` repeats targets that are on the device already; images,
where the student looks at them, are read and decoded whatever the source. `cached` rows are read and decoded for the
first time; `kept` ones are in memory as stored, as from a second epoch on. Peak memory is that of the process (of the
GPU, if there is one). Real images come from
KPU_TEST_DATA (default ../shared, see CONTRIBUTING.md); the weights of the ViTs are random, which changes no timing.
What a codec changes in what is learned is measured by `students.py`.
"""

import itertools
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Final

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from train_data import SIDE, extract_cifar, extract_vits

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.data.corpus import Corpus
    from trainer.data.loading import Batch
    from trainer.loop.world import World
    from trainer.model import Inheritance

HOME: Final = Path(__file__).parents[1] / "build/benchmark-train"
STUDENTS: Final[dict[str, dict[str, Any]]] = {
    "full": {"student": {"kind": "full", "model": "timm:vit_tiny_patch16_224", "weights": "random"}},
    "side": {"student": {"kind": "side"}},
    "side, global": {"student": {"kind": "side"}, "outputs": ["global"]},
}
SOURCES: Final = ("resident", "cached")
KEPT: Final = "kept"
LIVE: Final = ("full", "live")
app = typer.Typer(add_completion=False)
Folder = Annotated[Path, typer.Option(help="Where caches and runs lie.")]


@app.command("time")
def measure_time(
    folder: Folder = HOME,
    batch: Annotated[int, typer.Option(help="Rows a step.")] = 128,
    steps: Annotated[int, typer.Option(help="Steps that are timed, after two that are not.")] = 3,
    rounds: Annotated[int, typer.Option(help="How often every variant runs.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Time a step of every student on resident and on cached targets, and one that runs the teachers."""
    base = {"caches": [str(extract_vits(folder))], "base": "dino"}
    students = {name: {**base, **keys} for name, keys in STUDENTS.items()}
    variants = [*itertools.product(students, SOURCES), LIVE]
    _show(_rounds(students, variants, batch, steps, rounds, device), batch)


@app.command()
def busy(
    folder: Folder = HOME,
    batch: Annotated[int, typer.Option(help="Rows a step.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps that are timed, after two that are not.")] = 12,
    rounds: Annotated[int, typer.Option(help="How often every variant runs.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rows: Annotated[int, typer.Option(help="Images: as many as all steps of a variant take, so that each is new.")] = (
        10_000
    ),
    threads: Annotated[str, typer.Option(help="That read ahead.")] = "auto",
) -> None:
    """Time side students on cached against resident targets, and say how much of the memory's speed that takes."""
    cache = extract_cifar(folder, "train", rows, "uniform 0.05")
    base = {
        "caches": [str(cache)],
        "base": "general",
        "loader": {"memory": "auto", "threads": threads if threads == "auto" else int(threads)},
    }
    students: dict[str, dict[str, Any]] = {
        "side": {**base, "student": SIDE},
        "side, global": {**base, "outputs": ["global"]},
    }
    variants = list(itertools.product(students, (*SOURCES, KEPT)))
    found = _rounds(students, variants, batch, steps, rounds, device)
    _show(found, batch)
    _show_bandwidth(found, batch, torch.device(device))


@app.command(hidden=True)
def one(
    values: str,
    source: str,
    batch: int,
    steps: int,
    device: str,
) -> None:
    """Time one variant, as this script calls itself."""
    print(json.dumps(_time(json.loads(values), source, batch, steps, device)))


def _rounds(
    students: Mapping[str, Mapping[str, Any]],
    variants: Sequence[tuple[str, str]],
    batch: int,
    steps: int,
    rounds: int,
    device: str,
) -> dict[tuple[str, str], list[dict[str, float]]]:
    found: dict[tuple[str, str], list[dict[str, float]]] = {variant: [] for variant in variants}
    for _, (student, source) in itertools.product(range(rounds), variants):
        command = [sys.executable, __file__, "one", json.dumps(students[student]), source, str(batch), str(steps)]
        output = subprocess.run([*command, device], check=True, capture_output=True, text=True).stdout
        found[student, source].append(json.loads(output.splitlines()[-1]))
        print(f"{student}, {source}: {found[student, source][-1]}", flush=True)
    return found


def _show(found: dict[tuple[str, str], list[dict[str, float]]], batch: int) -> None:
    median = {
        variant: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for variant, runs in found.items()
    }
    table = Table(title=f"batch {batch}; ratios of medians")
    for column in ("student", "targets", "s/step", "of resident", "of live full step", "rows/s", "peak memory, MiB"):
        table.add_column(column, justify="left" if column in ("student", "targets") else "right")
    live = median.get(LIVE, {}).get("seconds")
    for (student, source), figures in median.items():
        own = median[student, "resident"]["seconds"]
        seconds = figures["seconds"]
        table.add_row(
            student,
            source,
            f"{seconds:.4f}",
            f"{seconds / own:.3f}",
            f"{seconds / live:.4f}" if live else "",
            f"{batch / seconds:,.0f}",
            f"{figures['peak_mib']:,.0f}",
        )
    Console(width=120).print(table)


def _show_bandwidth(found: Mapping[tuple[str, str], list[dict[str, float]]], batch: int, device: torch.device) -> None:
    """How fast targets flow as stored, beside how fast memory is copied (bytes read), and for a GPU brought to it."""
    limits = {"memory": _copy_rate(torch.empty(2**28, dtype=torch.uint8), torch.device("cpu"))}
    if device.type == "cuda":
        limits["host to device"] = _copy_rate(torch.empty(2**28, dtype=torch.uint8, pin_memory=True), device)
        limits["device memory"] = _copy_rate(torch.empty(2**28, dtype=torch.uint8, device=device), device)
    for name, limit in limits.items():
        print(f"copying, {name}: {limit / 1e9:.1f} GB/s")
    for (student, source), runs in found.items():
        rate = runs[0]["stored_bytes"] / statistics.median(run["seconds"] for run in runs)
        shares = ", ".join(f"{rate / limit:.3f} of {name}" for name, limit in limits.items())
        each = runs[0]["stored_bytes"] / batch
        print(f"{student}, {source}: {each:,.0f} bytes a row, {rate / 1e9:.2f} GB/s: {shares}")


def _copy_rate(origin: torch.Tensor, device: torch.device) -> float:
    """Bytes a second, the best of ten."""
    target, found = torch.empty_like(origin, device=device), []
    for _ in range(10):
        _settle(device)
        begun = perf_counter()
        target.copy_(origin, non_blocking=True)
        _settle(device)
        found.append(origin.nbytes / (perf_counter() - begun))
    return max(found)


def _time(student: Mapping[str, Any], source: str, batch: int, steps: int, device: str) -> dict[str, float]:
    from trainer.config import validate_config
    from trainer.data.corpus import Corpus
    from trainer.loop.batches import open_corpus
    from trainer.loop.training import Training
    from trainer.loop.world import join_world
    from trainer.model import Inheritance

    values = {
        "loader": {"memory": 0},
        **student,
        "batch_size": batch,
        "device": device,
        "validation": 0.0,
        "targets": {"source": "live" if source == "live" else "cache"},
    }
    config = validate_config(values, "benchmark")
    world = join_world(config)
    corpus = open_corpus(config, world)
    model = Inheritance(config, corpus.sources).to(world.device)
    training = Training(config, model, world, steps + 2)
    with ExitStack() as stack:
        if source == "resident":
            with closing(_batches(config, corpus, model, world)) as batches:
                kept = itertools.cycle(list(itertools.islice(batches, 4)))
            without_targets = Corpus(config.caches, {config.base: ()}, config.base)
            images = stack.enter_context(closing(_batches(config, without_targets, model, world)))
            ready = (replace(next(kept), images=batch.images) for batch in images)
        else:
            if source == KEPT:
                for first in range(0, corpus.rows, batch):
                    corpus.fetch(np.arange(first, min(first + batch, corpus.rows)))
            ready = stack.enter_context(closing(_batches(config, corpus, model, world)))
        for _ in range(2):
            training.advance([next(ready)], measure=False)
        _settle(world.device)
        begun = perf_counter()
        for _ in range(steps):
            training.advance([next(ready)], measure=False)
        _settle(world.device)
        seconds = (perf_counter() - begun) / steps
    if world.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    stored = sum(values.nbytes for values in corpus.fetch(np.arange(batch)).stored.values())
    return {"seconds": seconds, "peak_mib": peak, "stored_bytes": stored}


def _batches(config: "TrainConfig", corpus: "Corpus", model: "Inheritance", world: "World") -> "Generator[Batch]":
    from trainer.data.loading import DeviceTransfer
    from trainer.loop.batches import draw_batches, open_loader, open_stream

    live: Callable[..., Any] | None = None
    if config.targets.source == "live":
        from cli.live import run_teachers

        live = run_teachers
    upload = DeviceTransfer(corpus, world.device, model.student.input, raw=live is not None)
    with open_loader(config, corpus, model, live) as loader:
        for _, host in loader.load(draw_batches(open_stream(config, corpus), config.batch_size)):
            yield upload(host)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    app()
