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
    from trainer.evaluation.evaluate import evaluate
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
    """Means over seeds, then paired differences to the first cell with 95% intervals (t distribution)."""
    results = _results(folder, tier)
    chosen = TIERS[tier]()
    runs = {cell: {r["seed"]: _figures(r["scores"]) for r in results if r["cell"] == cell} for cell in chosen.cells}
    _add_balance(runs)
    runs = {cell: found for cell, found in runs.items() if found}
    names = list(dict.fromkeys(name for found in runs.values() for figures in found.values() for name in figures))
    reference = next(iter(chosen.cells))
    means = {
        cell: [_mean([f[name] for f in found.values() if name in f]) for name in names] for cell, found in runs.items()
    }
    paired = {
        cell: [_difference(found, runs[reference], name) for name in names]
        for cell, found in runs.items()
        if cell != reference
    }
    _print(f"Tier {tier}: means", names, means, {cell: len(found) for cell, found in runs.items()})
    _print(f"Tier {tier}: differences to '{reference}', 95%", names, paired, {cell: len(runs[cell]) for cell in paired})


def _print(title: str, names: list[str], rows: Mapping[str, list[str]], seeds: Mapping[str, int]) -> None:
    shown = Table(title=title, box=None, pad_edge=False)
    for column in ("cell", "seeds", *names):
        shown.add_column(column, justify="left" if column == "cell" else "right")
    for cell, values in rows.items():
        shown.add_row(cell, str(seeds[cell]), *values)
    Console(width=250).print(shown)


def _figures(scores: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one run under short names; R2 is the mean over outputs."""
    found: dict[str, float | None] = {}
    for name, values in scores["teachers"].items():
        short = name.partition("_")[0]
        r2 = [value for key, value in values.items() if key.startswith("r2_") and value is not None]
        found |= {
            f"{short} R2": float(np.mean(r2)),
            f"{short} agree": values["agreement"],
            f"{short} kappa": values["kappa"],
        }
    found |= {"base R2": scores["base"]["r2"], "base kappa": scores["base"]["kappa"]}
    found |= {"probe": scores["linear_probe"], "knn": scores["knn"]}
    return {name: value for name, value in found.items() if value is not None}


def _add_balance(runs: Mapping[str, dict[int, dict[str, float]]]) -> None:
    """Add the least rho of the specialists: R2 from that of the frozen base (0) to that of a student of its own (1)."""
    frozen = runs.get("frozen base", {})
    for found in runs.values():
        for seed, figures in found.items():
            rho = []
            for name in ("animals", "vehicles"):
                key = f"{name} R2"
                solo = runs.get(f"solo {name}", {}).get(seed, {}).get(key)
                zero = frozen.get(seed, {}).get(key)
                if solo is not None and zero is not None and key in figures:
                    rho.append((figures[key] - zero) / (solo - zero))
            if len(rho) == 2:
                figures["min rho"] = min(rho)


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" if values else ""


def _difference(runs: Mapping[int, Any], others: Mapping[int, Any], name: str) -> str:
    shared = [seed for seed in runs if seed in others and name in runs[seed] and name in others[seed]]
    found = [runs[seed][name] - others[seed][name] for seed in shared]
    if not found:
        return ""
    half = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found) if len(found) > 1 else float("nan")
    return f"{np.mean(found):+.3f}±{half:.3f}"


def _results(folder: Path, tier: str) -> list[dict[str, Any]]:
    file = folder / "results.jsonl"
    lines: Iterator[str] = iter(file.read_text().splitlines() if file.exists() else [])
    return [result for line in lines if (result := json.loads(line))["tier"] == tier]


if __name__ == "__main__":
    app()
