"""What a student inherits from three CIFAR teachers, and which part of the method is to thank for it.

    python benchmarks/inheritance.py caches             # extract the caches, once (about 10 minutes on two cores)
    python benchmarks/inheritance.py run --tier A       # global targets only, ten seeds a cell
    python benchmarks/inheritance.py run --tier B --seeds 1
    python benchmarks/inheritance.py table --tier A

Students are trained on the training cache alone and evaluated on the test cache. Each cell of a tier is one change of
configuration against the tier's reference, on the same seeds and the same batches, so that differences are paired.
Results go to `<folder>/results.jsonl`; what is there already is not run again. Real images and teachers come from
KPU_TEST_DATA (default ../shared, see CONTRIBUTING.md).
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Final

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy import stats

REPOSITORY: Final = Path(__file__).parents[1]
DATA: Final = Path(os.environ.get("KPU_TEST_DATA", REPOSITORY.parent / "shared")).resolve()
app = typer.Typer(add_completion=False)
Folder = Annotated[Path, typer.Option(help="Where caches, runs and results lie.")]
HOME: Final = REPOSITORY / "build/inheritance"

ANIMALS: Final = [2, 3, 4, 5, 6, 7, None]
VEHICLES: Final = [0, 1, 8, 9, None]
THREE: Final = ["general", "animals", "vehicles"]


@dataclass(frozen=True)
class Tier:
    """Cells by name, each a flat mapping of configuration keys laid over `common`; the first is the reference."""

    common: Mapping[str, Any]
    cells: Mapping[str, Mapping[str, Any]]
    seeds: int
    processes: int
    outputs: tuple[str, ...] = field(default=("global",))


def _tier_a() -> Tier:
    losses = {"pair": {}, "mse": {"loss.cosine": 0.0, "loss.smooth_l1": 0.0, "loss.mse": 1.0}}
    cells: dict[str, dict[str, Any]] = {"standardize": {}}
    cells["frozen base"] = {"student.kind": "frozen"}
    for name in THREE:
        cells[f"solo {name}"] = {"teachers": sorted({"general", name}), "student.solo": name}
    for unit in ("", "_x10", "_by10"):
        teachers = {"teachers": ["general", "animals", f"vehicles{unit}"]}
        for normalize in ("raw", "standardize", "phi-s"):
            for loss, keys in losses.items():
                if (unit, normalize, loss) != ("", "standardize", "pair"):
                    label = {"": "", "_x10": ", vehicles x10", "_by10": ", vehicles /10"}[unit]
                    cells[f"{normalize}, {loss}{label}"] = {**teachers, "targets.normalize": normalize, **keys}
    for mode in ("pretrained", "joint", "pca", "untrained"):
        cells[f"t2s {mode}"] = {"unify.mode": mode}
    cells["preserve"] = {"preserve.weight": 1.0}
    cells["concat"] = {"student.merge": "concat"}
    cells["dropping"] = {"balance.name": "dropping"}
    cells = {name: keys for name, keys in cells.items() if "student.solo" not in keys}
    for name in THREE[1:]:
        cells[f"solo {name}"] = {"teachers": ["general", name]}
    common = {
        "outputs": ["global"],
        "student.width": 64,
        "projector.hidden": 128,
        "batch_size": 1024,
        "optim.epochs": 10,
        "optim.lr": 2e-3,
        "threads": 1,
    }
    return Tier(common, cells, seeds=10, processes=2)


def _tier_b() -> Tier:
    cells = {
        "standardize": {},
        "preserve": {"preserve.weight": 1.0},
        "concat": {"student.merge": "concat"},
        "t2s pretrained": {"unify.mode": "pretrained"},
        "t2s untrained": {"unify.mode": "untrained"},
    }
    common = {
        "outputs": ["global", "patch"],
        "student.layers": ["layer1.patch", "layer2.patch"],
        "batch_size": 256,
        "optim.epochs": 14,
    }
    return Tier(common, cells, seeds=3, processes=1, outputs=("global", "patch"))


TIERS: Final = {"A": _tier_a, "B": _tier_b}


@app.command()
def caches(folder: Folder = HOME) -> None:
    """Extract the training and the test cache, the latter with the former's calibration."""
    from pipeline.config import validate_config
    from pipeline.extract import extract

    def teacher(file: str, weights: str, **more: Any) -> dict[str, Any]:
        path = DATA / f"teachers/cifar_kpu/{weights}.pt"
        return {"model": f"torch:{REPOSITORY}/{file}", "weights": str(path), **more}

    resnet, scaled = "examples/cifar_resnet.py", "benchmarks/cifar_scaled.py"
    only = {"outputs": ["global"], "labels": VEHICLES}
    teachers = {
        "general": teacher(f"{resnet}:resnet56", "general", layers=["layer1", "layer2"]),
        "animals": teacher(f"{resnet}:resnet20", "animals", labels=ANIMALS),
        "vehicles": teacher(f"{resnet}:resnet20", "vehicles", labels=VEHICLES),
        "vehicles_x10": teacher(f"{scaled}:times_10", "vehicles", **only),
        "vehicles_by10": teacher(f"{scaled}:by_10", "vehicles", **only),
    }
    for split, same in (("train", None), ("test", str(folder / "train.kpu"))):
        config = {
            "data": {"source": str(DATA / f"data/cifar10/{split}-*.parquet")},
            "out": str(folder / f"{split}.kpu"),
            "calibration_from": same,
            "teachers": teachers,
        }
        extract(validate_config(config, split))


@app.command()
def run(
    tier: Annotated[str, typer.Option(help="A or B.")],
    folder: Folder = HOME,
    seeds: Annotated[int, typer.Option(help="How many; 0 for the tier's own number.")] = 0,
    cells: Annotated[str, typer.Option(help="Only cells whose name contains this.")] = "",
    keep: Annotated[bool, typer.Option(help="Keep the folders of the runs.")] = False,
) -> None:
    """Train and evaluate every cell that has no result yet, then print the table."""
    chosen = TIERS[tier]()
    done = {(r["cell"], r["seed"]) for r in _results(folder, tier)}
    todo = [
        (cell, seed)
        for seed in range(seeds or chosen.seeds)
        for cell in chosen.cells
        if cells in cell and (cell, seed) not in done
    ]
    with ProcessPoolExecutor(chosen.processes, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(_one, tier, cell, seed, folder, keep) for cell, seed in todo]
        for number, future in enumerate(as_completed(waiting), start=1):
            result = future.result()
            with (folder / "results.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
            what = f"{result['cell']}, seed {result['seed']}"
            print(f"{number}/{len(todo)}: {what}, {result['seconds']:.1f} s", flush=True)
    table(tier, folder)


def _one(tier: str, cell: str, seed: int, folder: Path, keep: bool) -> dict[str, Any]:
    from trainer.config import validate_config
    from trainer.evaluate import evaluate
    from trainer.loop import fit

    chosen = TIERS[tier]()
    keys = {"seed": seed, "teachers": THREE, **chosen.common, **chosen.cells[cell]}
    values: dict[str, Any] = {"caches": [str(folder / "train.kpu")], "base": "general"}
    for key, value in keys.items():
        section, _, leaf = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[leaf] = value
    out = folder / "runs" / f"{tier}-{cell}-{seed}".replace(" ", "_").replace("/", "by")
    shutil.rmtree(out, ignore_errors=True)
    begun = perf_counter()
    fitted = fit(validate_config(values, cell), out)
    trained = perf_counter() - begun
    scores = evaluate(out, [str(folder / "test.kpu")], controls=False)
    if not keep:
        shutil.rmtree(out)
    return {
        "tier": tier,
        "cell": cell,
        "seed": seed,
        "seconds": trained,
        "evaluation_seconds": perf_counter() - begun - trained,
        "summary": fitted.summary,
        "scores": scores,
    }


@app.command()
def table(tier: Annotated[str, typer.Option(help="A or B.")], folder: Folder = HOME) -> None:
    """Means over seeds, and paired differences to the first cell with 95% intervals."""
    results = _results(folder, tier)
    chosen = TIERS[tier]()
    reference = next(iter(chosen.cells))
    figures = {cell: {r["seed"]: _figures(r["scores"]) for r in results if r["cell"] == cell} for cell in chosen.cells}
    names = list(dict.fromkeys(name for runs in figures.values() for run in runs.values() for name in run))
    console = Console(width=200)
    shown = Table(title=f"Tier {tier}: mean over seeds; in brackets the paired difference to '{reference}', 95%")
    shown.add_column("cell")
    shown.add_column("seeds", justify="right")
    for name in names:
        shown.add_column(name, justify="right")
    for cell, runs in figures.items():
        if runs:
            columns = [
                _cell([run.get(name) for run in runs.values()], _paired(runs, figures[reference], name))
                for name in names
            ]
            shown.add_row(cell, str(len(runs)), *columns)
    console.print(shown)


def _figures(scores: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, values in scores["teachers"].items():
        short = name.partition("_")[0]
        found |= {
            f"{short} {key}": values[key]
            for key in ("r2_global", "r2_patch", "agreement", "kappa")
            if values.get(key) is not None
        }
    found |= {"base r2": scores["base"]["r2"], "base kappa": scores["base"].get("kappa")}
    found |= {key: scores[key] for key in ("linear_probe", "knn", "effective_rank") if scores.get(key) is not None}
    return {name: value for name, value in found.items() if value is not None}


def _paired(runs: Mapping[int, Any], others: Mapping[int, Any], name: str) -> list[float]:
    return [runs[s][name] - others[s][name] for s in runs if s in others and name in runs[s] and name in others[s]]


def _cell(values: list[float | None], differences: list[float]) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return ""
    text = f"{np.mean(present):.3f}"
    if any(differences):
        half = (
            stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences) if len(differences) > 1 else float("nan")
        )
        text += f"\n[{np.mean(differences):+.3f} ± {half:.3f}]"
    return text


def _results(folder: Path, tier: str) -> list[dict[str, Any]]:
    file = folder / "results.jsonl"
    lines: Iterator[str] = iter(file.read_text().splitlines() if file.exists() else [])
    return [result for line in lines if (result := json.loads(line))["tier"] == tier]


if __name__ == "__main__":
    app()
