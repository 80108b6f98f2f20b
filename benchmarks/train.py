"""A training step on cached targets against one on resident targets, and against one that runs the teachers.

    python benchmarks/train.py time                 # three ViT-S teachers, a ViT-Ti student and two side students
    python benchmarks/train.py time --device cuda --batch 256
    python benchmarks/train.py loss                 # what caching changes in what is learned: CIFAR teachers
    python benchmarks/train.py busy                 # a side student on CIFAR maps, batch 256, cached against resident

Each variant of `time` and `busy` runs in a process of its own, in rounds, so that a machine that drifts in speed drifts
for all of them; the figures are medians over rounds. `resident` repeats batches that are on the device already: what
the model alone costs. Peak memory is that of the process (of the GPU, where there is one). `loss` trains the same
student on the same batches three times: on the default codec, on a lossless cache, and on teachers that run in the
loop. Real images come from KPU_TEST_DATA (default ../shared, see CONTRIBUTING.md); the weights of the ViTs are random,
which changes no timing.
"""

import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

REPOSITORY: Final = Path(__file__).parents[1]
DATA: Final = Path(os.environ.get("KPU_TEST_DATA", REPOSITORY.parent / "shared")).resolve()
HOME: Final = REPOSITORY / "build/benchmark-train"
TEACHERS: Final = {"dino": "vit_small_patch16_dinov3", "sup": "vit_small_patch16_224", "deit": "deit_small_patch16_224"}
STUDENTS: Final[dict[str, dict[str, Any]]] = {
    "full": {"student": {"kind": "full", "model": "timm:vit_tiny_patch16_224", "weights": "random"}},
    "side": {"student": {"kind": "side"}},
    "side, global": {"student": {"kind": "side"}, "outputs": ["global"]},
}
SIDE: Final = {"kind": "side", "layers": ["layer1.patch", "layer2.patch"]}
SOURCES: Final = ("resident", "cached", "live")
app = typer.Typer(add_completion=False)


Folder = Annotated[Path, typer.Option(help="Where caches and runs lie.")]


@app.command("time")
def measure_time(
    folder: Folder = HOME,
    batch: Annotated[int, typer.Option(help="Rows a step.")] = 32,
    steps: Annotated[int, typer.Option(help="Steps that are timed, after two that are not.")] = 6,
    rounds: Annotated[int, typer.Option(help="How often every variant runs.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Time a step of every student on every source of targets."""
    cache = _extract_vits(folder)
    base = {"caches": [str(cache)], "base": "dino"}
    _show(_rounds({n: {**base, **keys} for n, keys in STUDENTS.items()}, SOURCES, batch, steps, rounds, device), batch)


@app.command()
def busy(
    folder: Folder = HOME,
    batch: Annotated[int, typer.Option(help="Rows a step.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps that are timed, after two that are not.")] = 12,
    rounds: Annotated[int, typer.Option(help="How often every variant runs.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Time side students on cached against resident targets, every row read and decoded for the first time."""
    cache = _extract_cifar(folder, "train", 10_000, "uniform")
    base = {"caches": [str(cache)], "base": "general"}
    students: dict[str, dict[str, Any]] = {
        "side": {**base, "student": SIDE},
        "side, global": {**base, "outputs": ["global"]},
    }
    _show(_rounds(students, SOURCES[:2], batch, steps, rounds, device), batch)


@app.command()
def loss(
    folder: Folder = HOME,
    rows: Annotated[int, typer.Option(help="Training images.")] = 5_000,
    epochs: Annotated[int, typer.Option(help="Passes over them.")] = 3,
    seeds: Annotated[int, typer.Option(help="How many.")] = 2,
) -> None:
    """Compare students that learned from cached and from live targets, on images that none of them saw."""
    from cli.live import run_teachers
    from trainer.config import validate_config
    from trainer.evaluation.evaluate import evaluate
    from trainer.loop import fit

    trained = {name: _extract_cifar(folder, "train", rows, name) for name in ("uniform", "fp32")}
    test = _extract_cifar(folder, "test", 2_000, "fp32", same=trained["fp32"])
    sources = {"default codec": ("uniform", "cache"), "lossless": ("fp32", "cache"), "live": ("uniform", "live")}
    table = Table(title=f"{rows} images, {epochs} epochs; students on 2,000 others, R2 over all teachers and outputs")
    for column in ("seed", "targets", "R2", "change from live", "agreement with live", "seconds"):
        table.add_column(column, justify="left" if column == "targets" else "right")
    for seed in range(seeds):
        found: dict[str, tuple[float, np.ndarray[Any, Any], float]] = {}
        for name, (codec, source) in sources.items():
            values = {
                "caches": [str(trained[codec])],
                "base": "general",
                "student": SIDE,
                "targets": {"source": source},
                "optim": {"epochs": epochs},
                "seed": seed,
            }
            out = folder / "runs" / f"{name}-{seed}".replace(" ", "-")
            shutil.rmtree(out, ignore_errors=True)
            begun = perf_counter()
            fit(validate_config(values, name), out, live=run_teachers)
            seconds = perf_counter() - begun
            scores = evaluate(out, [str(test)], controls=False)["teachers"]
            r2 = [value for each in scores.values() for key, value in each.items() if key.startswith("r2_")]
            found[name] = (float(np.mean(r2)), _said(out, test), seconds)
        live_r2, live_said, _ = found["live"]
        for name, (r2_all, said, seconds) in found.items():
            same = f"{(said == live_said).mean():.4f}"
            table.add_row(str(seed), name, f"{r2_all:.4f}", f"{r2_all - live_r2:+.4f}", same, f"{seconds:.0f}")
    Console(width=120).print(table)


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
    sources: Sequence[str],
    batch: int,
    steps: int,
    rounds: int,
    device: str,
) -> dict[tuple[str, str], list[dict[str, float]]]:
    variants = list(itertools.product(students, sources))
    found: dict[tuple[str, str], list[dict[str, float]]] = {variant: [] for variant in variants}
    for _, (student, source) in itertools.product(range(rounds), variants):
        command = [sys.executable, __file__, "one", json.dumps(students[student]), source, str(batch), str(steps)]
        output = subprocess.run([*command, device], check=True, capture_output=True, text=True).stdout
        found[student, source].append(json.loads(output.splitlines()[-1]))
        print(f"{student}, {source}: {found[student, source][-1]}", flush=True)
    return found


def _said(run: Path, cache: Path) -> np.ndarray[Any, Any]:
    """What the student has each teacher's head say of every row, int64 [teachers * rows]."""
    from trainer.data import Loader, Upload
    from trainer.evaluation.measured import open_measured
    from trainer.evaluation.measures import OwnHead
    from trainer.evaluation.scores import batches_of
    from trainer.evaluation.trained import load_trained

    trained = load_trained(run)
    corpus = open_measured(trained, [str(cache)], [])
    upload = Upload(corpus, torch.device("cpu"), None)
    said: dict[str, list[np.ndarray[Any, Any]]] = {}
    with Loader(corpus.fetch, 2, 4) as loader, torch.no_grad():
        for batch in batches_of(np.arange(corpus.rows), 256, loader, upload):
            features = trained.model.encode(batch)
            for name, source in trained.sources.items():
                predicted = trained.model.predict(features, name)
                if predicted is not None:
                    answers = OwnHead(source, torch.device("cpu"))(predicted["global"])
                    said.setdefault(name, []).append(answers)
    return np.concatenate([np.concatenate(parts) for parts in said.values()])


def _show(found: dict[tuple[str, str], list[dict[str, float]]], batch: int) -> None:
    median = {
        variant: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for variant, runs in found.items()
    }
    table = Table(title=f"batch {batch}; ratios of medians")
    for column in ("student", "targets", "s/step", "of resident", "of live full step", "rows/s", "peak memory, MiB"):
        table.add_column(column, justify="left" if column in ("student", "targets") else "right")
    live = median.get(("full", "live"), {}).get("seconds")
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


def _extract_vits(folder: Path) -> Path:
    from pipeline.config import validate_config
    from pipeline.extract import extract

    teachers = {name: {"model": f"timm:{model}", "weights": "random"} for name, model in TEACHERS.items()}
    source = {"source": str(DATA / "data/imagenet-sample/*.tar")}
    out = folder / "cache.kpu"
    extract(validate_config({"data": source, "out": str(out), "teachers": teachers}, "benchmark"))
    return out


def _extract_cifar(folder: Path, split: str, rows: int, codec: str, same: Path | None = None) -> Path:
    from pipeline.config import validate_config
    from pipeline.extract import extract

    def teacher(model: str, weights: str, **more: Any) -> dict[str, Any]:
        path = DATA / f"teachers/cifar_kpu/{weights}.pt"
        return {"model": f"torch:{REPOSITORY}/examples/cifar_resnet.py:{model}", "weights": str(path), **more}

    out = folder / f"cifar-{split}-{rows}-{codec}.kpu"
    config = {
        "data": {"source": str(DATA / f"data/cifar10/{split}-*.parquet"), "limit": rows},
        "out": str(out),
        "codec": {"name": codec},
        "calibration_from": str(same) if same else None,
        "teachers": {
            "general": teacher("resnet56", "general", layers=["layer1", "layer2"]),
            "animals": teacher("resnet20", "animals"),
            "vehicles": teacher("resnet20", "vehicles"),
        },
    }
    extract(validate_config(config, "benchmark"))
    return out


def _time(student: Mapping[str, Any], source: str, batch: int, steps: int, device: str) -> dict[str, float]:
    from trainer.config import validate_config
    from trainer.data import Upload
    from trainer.loop import draw_batches, open_corpus, open_loader, open_stream
    from trainer.model import Inheritance
    from trainer.training import Training
    from trainer.world import join_world

    values = {
        **student,
        "batch_size": batch,
        "device": device,
        "validation": 0.0,
        "targets": {"source": "live" if source == "live" else "cache"},
        "loader": {"memory": 0},
    }
    config = validate_config(values, "benchmark")
    world = join_world(config)
    corpus = open_corpus(config, world)
    model = Inheritance(config, corpus.sources).to(world.device)
    stream = open_stream(config, corpus)
    training = Training(config, model, world, steps + 2)
    live: Callable[..., Any] | None = None
    if source == "live":
        from cli.live import run_teachers

        live = run_teachers
    with open_loader(config, corpus, model, live) as loader:
        upload = Upload(corpus, world.device, model.student.input, raw=source == "live")
        loaded: Iterator[Any] = loader.load(draw_batches(stream, config, 0))
        ready: Iterator[Any] = (upload(host) for _, host in loaded)
        if source == "resident":
            ready = itertools.cycle([next(ready) for _ in range(4)])
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
    return {"seconds": seconds, "peak_mib": peak}


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    app()
