"""What a student inherits from three CIFAR teachers, and which part of the method is to thank for it.

    python benchmarks/inheritance.py caches             # extract the caches, once (about 10 minutes on two cores)
    python benchmarks/inheritance.py controls           # what probes find in the teachers, alone and together
    python benchmarks/inheritance.py run --tier A       # global targets only, ten seeds a cell
    python benchmarks/inheritance.py run --tier B --seeds 1
    python benchmarks/inheritance.py run --tier C
    python benchmarks/inheritance.py table --tier A

Students are trained on the training cache alone and evaluated on the test cache. The cells of a tier, in
`inheritance_tiers.py`, share seeds and batches, so that differences are paired. Results go to `<folder>/results.jsonl`;
what is there already is not run again. Real images and teachers come from KPU_TEST_DATA (default ../shared, see
CONTRIBUTING.md).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from inheritance_tiers import ALL, BASE, SPECIALISTS, TIERS, Cell
from real_data import DATA, REPOSITORY, cifar_teacher
from rich.console import Console
from rich.table import Table

from trainer.sweep.ablate import reach

app = typer.Typer(add_completion=False)
Folder = Annotated[Path, typer.Option(help="Where caches, runs and results lie.")]
Which = Annotated[str, typer.Option(help="A, B or C.")]
HOME: Final = REPOSITORY / "build/inheritance"
ANIMALS: Final = [2, 3, 4, 5, 6, 7, None]
VEHICLES: Final = [0, 1, 8, 9, None]


@app.command()
def caches(folder: Folder = HOME) -> None:
    """Extract the training and the test cache, the latter with the former's calibration."""
    from pipeline.config import validate_config
    from pipeline.extract import extract

    only: dict[str, Any] = {"file": "benchmarks/cifar_scaled.py", "outputs": ["global"], "labels": VEHICLES}
    teachers = {
        "general": cifar_teacher("resnet56", "general", layers=["layer1", "layer2"]),
        "animals": cifar_teacher("resnet20", "animals", labels=ANIMALS),
        "vehicles": cifar_teacher("resnet20", "vehicles", labels=VEHICLES),
        "vehicles_x10": cifar_teacher("times_10", "vehicles", **only),
        "vehicles_by10": cifar_teacher("by_10", "vehicles", **only),
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
def controls(folder: Folder = HOME) -> None:
    """Probe the vectors of each teacher, of all side by side, and their first principal axes, as many as the base has.

    Vectors are standardised by the training cache's statistics; penalties are chosen on the validation rows.
    """
    from trainer.data.corpus import Corpus
    from trainer.data.loading import DeviceTransfer
    from trainer.evaluation.probes import knn, linear_probe

    train, test = (
        Corpus([str(folder / f"{split}.kpu")], dict.fromkeys(ALL, ("global",)), BASE) for split in ("train", "test")
    )
    y, y_test = (torch.from_numpy(corpus.labels()) for corpus in (train, test))
    chosen = torch.from_numpy(train.validation(0.02))
    own, own_test = (DeviceTransfer(c, torch.device("cpu"))(c.fetch(np.arange(c.rows))).targets for c in (train, test))
    spaces = {name: (own[name]["global"], own_test[name]["global"]) for name in ALL}
    joined, joined_test = (torch.cat(parts, dim=1) for parts in zip(*spaces.values(), strict=True))
    channels = own[BASE]["global"].shape[1]
    axes = torch.linalg.eigh(joined[~chosen].T.cov())[1][:, -channels:]
    spaces["all side by side"] = joined, joined_test
    spaces[f"their first {channels} axes"] = joined @ axes, joined_test @ axes
    for name, (x, x_test) in spaces.items():
        probe = linear_probe(x[~chosen], y[~chosen], x[chosen], y[chosen], x_test, y_test).accuracy
        print(f"{name}: linear probe {probe:.3f}, k-NN {knn(x[~chosen], y[~chosen], x_test, y_test):.3f}", flush=True)


@app.command()
def run(
    tier: Which,
    folder: Folder = HOME,
    seeds: Annotated[int, typer.Option(help="At most so many; 0 for each cell's own number.")] = 0,
    cells: Annotated[str, typer.Option(help="Only these cells, separated by semicolons.")] = "",
    keep: Annotated[bool, typer.Option(help="Keep the folders of the runs.")] = False,
    processes: Annotated[int, typer.Option(help="How many train at once; 0 for the tier's own number.")] = 0,
) -> None:
    """Train and evaluate every cell that has no result yet, then print the table."""
    chosen = TIERS[tier]()
    names = cells.split(";") if cells else list(chosen.cells)
    done = {(r["cell"], r["seed"]) for r in _results(folder, tier)}
    most = max(chosen.cells[name].seeds for name in names)
    missing = [
        (name, seed)
        for seed in range(most)
        for name in names
        if seed < min(chosen.cells[name].seeds, seeds or most) and (name, seed) not in done
    ]
    with ProcessPoolExecutor(processes or chosen.processes, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(_one, tier, name, seed, folder, keep) for name, seed in missing]
        for number, future in enumerate(as_completed(waiting), start=1):
            result = future.result()
            with (folder / "results.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
            what = f"{result['cell']}, seed {result['seed']}"
            print(f"{number}/{len(missing)}: {what}, {result['seconds']:.1f} s", flush=True)
    table(tier, folder)


def _one(tier: str, cell: str, seed: int, folder: Path, keep: bool) -> dict[str, Any]:
    from trainer.config import validate_config
    from trainer.evaluation.evaluate import evaluate
    from trainer.loop.fit import fit

    chosen = TIERS[tier]()
    keys = {"seed": seed, "teachers": list(ALL), **chosen.common, **chosen.cells[cell].keys}
    values: dict[str, Any] = {"caches": [str(folder / "train.kpu")], "base": BASE}
    for key, value in keys.items():
        section, _, leaf = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[leaf] = value
    out = folder / "runs" / f"{tier}-{cell}-{seed}".replace(" ", "_").replace("/", "by")
    shutil.rmtree(out, ignore_errors=True)
    begun = perf_counter()
    fitted = fit(validate_config(values, cell), out)
    trained = perf_counter() - begun
    # Controls depend on no cell, but for what a frozen base, or each teacher alone, would reach.
    scores = evaluate(out, [str(folder / "test.kpu")], controls=cell == next(iter(chosen.cells)) and seed == 0)
    if not keep:
        shutil.rmtree(out)
    result = {
        "tier": tier,
        "cell": cell,
        "seed": seed,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "steps": fitted.summary["steps"],
        "seconds": round(trained, 1),
        "evaluation_seconds": round(perf_counter() - begun - trained, 1),
        "figures": {name: round(value, 5) for name, value in _figures(fitted.summary, scores).items()},
    }
    return result | {key: scores[key] for key in ("frozen_base", "teacher_alone") if key in scores}


@app.command()
def table(tier: Which, folder: Folder = HOME) -> None:
    """Means over seeds, then paired differences with 95% intervals (t distribution)."""
    results = _results(folder, tier)
    cells: Mapping[str, Cell] = TIERS[tier]().cells
    runs = {cell: {r["seed"]: dict(r["figures"]) for r in results if r["cell"] == cell} for cell in cells}
    _add_balance(runs)
    runs = {cell: found for cell, found in runs.items() if found}
    names = list(dict.fromkeys(name for found in runs.values() for figures in found.values() for name in figures))
    means = {
        cell: [str(len(found)), *(_mean([f[name] for f in found.values() if name in f]) for name in names)]
        for cell, found in runs.items()
    }
    paired = {
        f"{cell} - {other}": ["", *(_difference(found, runs[other], name) for name in names)]
        for cell, found in runs.items()
        for other in cells[cell].against
        if other in runs
    }
    _print(f"Tier {tier}: means", names, means)
    _print(f"Tier {tier}: paired differences, 95%", names, paired)
    for result in results:
        if "teacher_alone" in result:
            print(json.dumps({key: result[key] for key in ("frozen_base", "teacher_alone")}, indent=1))


def _print(title: str, names: list[str], rows: Mapping[str, list[str]]) -> None:
    shown = Table(title=title, box=None, pad_edge=False)
    for column in ("cell", "seeds", *names):
        shown.add_column(column, justify="left" if column == "cell" else "right")
    for cell, values in rows.items():
        shown.add_row(cell, *values)
    Console(width=280).print(shown)


def _figures(summary: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one run under short names; R2 is the mean over outputs, `valid` over all, on held-back rows."""
    found = dict[str, float | None]()
    held_back = [r2 for values in summary["validation"]["teachers"].values() for r2 in values.values()]
    for name, values in scores["teachers"].items():
        short = name.partition("_")[0]
        r2 = [value for key, value in values.items() if key.startswith("r2_") and value is not None]
        found |= {
            f"{short} R2": float(np.mean(r2)),
            f"{short} agree": values["agreement"],
            f"{short} kappa": values["kappa"],
        }
    found |= {"base R2": scores["base"]["r2"], "base kappa": scores["base"]["kappa"]}
    found |= {"probe": scores["linear_probe"], "knn": scores["knn"], "valid": float(np.mean(held_back))}
    return {name: value for name, value in found.items() if value is not None}


def _add_balance(runs: Mapping[str, dict[int, dict[str, float]]]) -> None:
    """Add the least rho of the specialists: R2 from that of the frozen base (0) to that of a student of its own (1)."""
    frozen = runs.get("frozen base", {})
    for found in runs.values():
        for seed, figures in found.items():
            rho = []
            for name in SPECIALISTS:
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
    return f"{np.mean(found):+.3f}±{reach(np.array(found)):.3f}"


def _results(folder: Path, tier: str) -> list[dict[str, Any]]:
    file = folder / "results.jsonl"
    lines: Iterator[str] = iter(file.read_text().splitlines() if file.exists() else [])
    return [result for line in lines if (result := json.loads(line))["tier"] == tier]


if __name__ == "__main__":
    app()
