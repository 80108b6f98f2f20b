"""What storing targets changes in what students learn from them: every codec, and teachers in the loop.

    python benchmarks/students.py                   # 5,000 CIFAR images, 3 epochs, 3 seeds
    python benchmarks/students.py --epochs 8 --only "uniform 0.05" --only "uniform 0.2"

The same student is trained on the same batches again and again: on a lossless cache, on caches of several codecs, on
what the codecs of others (`codec_peers.py`) would give back, and on teachers that run in the loop. All are evaluated on
lossless features of images that none of them saw. `of fp16` is the size of a cache's features, the layers that the
student reads included, against fp16. Real images and teachers come from KPU_TEST_DATA (default ../shared, see
CONTRIBUTING.md). ZFP needs `pip install zfpy==1.0.1`.
"""

import itertools
import math
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from student_peers import peers_of, restored, size_of
from train_data import CODECS, LOSSLESS, SIDE, extract_cifar

from kpu import open_cache
from kpu.tools.status import status
from trainer.sweep.ablate import reach

HOME: Final = Path(__file__).parents[1] / "build/benchmark-train"
LIVE: Final = "live"
Said = list[np.ndarray[Any, Any]]
app = typer.Typer(add_completion=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Option(help="Where caches and runs lie.")] = HOME,
    rows: Annotated[int, typer.Option(help="Training images.")] = 5_000,
    epochs: Annotated[int, typer.Option(help="Passes over them.")] = 3,
    seeds: Annotated[int, typer.Option(help="How many.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="Only these targets, beside the lossless ones.")] = None,
) -> None:
    """Compare students that learned from caches and from live teachers, on images that none of them saw."""
    from cli.live import run_teachers
    from trainer.config import validate_config
    from trainer.evaluation.evaluate import evaluate
    from trainer.loop.fit import fit

    lossless = extract_cifar(folder, "train", rows, LOSSLESS)
    others = peers_of(lossless)
    names = [name for name in [*CODECS, *others, LIVE] if not only or name in (LOSSLESS, *only)]
    caches = {name: extract_cifar(folder, "train", rows, name) for name in names if name in CODECS}
    makers = {LIVE: run_teachers, **{name: restored(outputs) for name, outputs in others.items()}}
    sizes = {name: _size(path) for name, path in caches.items()}
    sizes |= {name: size_of(lossless, others[name]) for name in names if name in others}
    test = extract_cifar(folder, "test", 2_000, LOSSLESS, same=lossless)
    found: dict[str, list[dict[str, float]]] = {}
    said: dict[str, Said] = {}
    for seed, targets in itertools.product(range(seeds), names):
        values = {
            "caches": [str(caches.get(targets, lossless))],
            "base": "general",
            "student": SIDE,
            "targets": {"source": "live" if targets in makers else "cache"},
            "optim": {"epochs": epochs},
            "seed": seed,
        }
        out = folder / "runs" / f"{targets}-{seed}".replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)
        begun = perf_counter()
        fit(validate_config(values, targets), out, live=makers.get(targets))
        seconds = perf_counter() - begun
        scores = evaluate(out, [str(test)], controls=False)
        r2 = [value for each in scores["teachers"].values() for key, value in each.items() if key.startswith("r2_")]
        figures = {"r2": float(np.mean(r2)), "probe": scores["linear_probe"], "seconds": seconds}
        found.setdefault(targets, []).append(figures)
        said.setdefault(targets, []).append(_said(out, test))
        print(f"{targets}, seed {seed}: {figures}", flush=True)
    _show(
        found,
        said,
        sizes,
        f"{rows} images, {epochs} epochs, {seeds} seeds; students on 2,000 others",
    )


def _size(path: Path) -> float:
    """Bytes of all features of a cache against fp16."""
    cache = open_cache(path)
    outputs = (output for teacher in cache.teachers.values() for output in teacher.outputs.values())
    values = cache.rows * sum(math.prod(output.shape) for output in outputs)
    return sum(teacher.bytes for teacher in status(path).teachers.values()) / (2 * values)


def _show(
    found: Mapping[str, list[dict[str, float]]], said: Mapping[str, Said], sizes: Mapping[str, float], title: str
) -> None:
    """R2 is the mean over all teachers and outputs; changes are paired by seed, with 95% intervals."""
    table = Table(title=title)
    others = [other for other in (LOSSLESS, LIVE) if other in found]
    names = {LOSSLESS: "lossless", LIVE: "live"}
    compared = [f"{what} {names[other]}" for what in ("R2 from", "agrees with") for other in others]
    for column in ("targets", "of fp16", "R2", "probe", *compared, "s"):
        table.add_column(column, justify="left" if column == "targets" else "right")

    def means(targets: str, key: str) -> float:
        return statistics.mean(run[key] for run in found[targets])

    def change(targets: str, other: str) -> str:
        changes = [one["r2"] - two["r2"] for one, two in zip(found[targets], found[other], strict=True)]
        return f"{statistics.mean(changes):+.4f}±{reach(np.array(changes)):.4f}"

    def agreement(targets: str, other: str) -> str:
        shares = [(one == two).mean() for one, two in zip(said[targets], said[other], strict=True)]
        return f"{statistics.mean(shares):.4f}"

    for targets in found:
        against = [compare(targets, other) for compare in (change, agreement) for other in others]
        scores = [f"{means(targets, key):.4f}" for key in ("r2", "probe")]
        size = f"{sizes[targets]:.3f}" if targets in sizes else ""
        table.add_row(targets, size, *scores, *against, f"{means(targets, 'seconds'):.0f}")
    Console(width=140).print(table)


def _said(run: Path, cache: Path) -> np.ndarray[Any, Any]:
    """What the student has each teacher's head say of every row, int64 [teachers * rows]."""
    from trainer.data.loading import BatchLoader, DeviceTransfer
    from trainer.evaluation.measured import open_measured
    from trainer.evaluation.measures import OwnHead
    from trainer.evaluation.trained import load_trained
    from trainer.loop.scores import batches_of

    trained = load_trained(run)
    corpus = open_measured(trained, [str(cache)], [])
    upload = DeviceTransfer(corpus, torch.device("cpu"), None)
    said: dict[str, list[np.ndarray[Any, Any]]] = {}
    with BatchLoader(corpus.fetch, 2, 4) as loader, torch.no_grad():
        for batch in batches_of(np.arange(corpus.rows), 256, loader, upload):
            features = trained.model.encode(batch)
            for name, source in trained.sources.items():
                predicted = trained.model.predict(features, name)
                if predicted is not None:
                    answers = OwnHead(source, torch.device("cpu"))(predicted["global"])
                    said.setdefault(name, []).append(answers)
    return np.concatenate([np.concatenate(parts) for parts in said.values()])


if __name__ == "__main__":
    app()
