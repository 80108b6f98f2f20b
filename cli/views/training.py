"""How a training looks: a line every few seconds, and a table at the end."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cli.output import say
from cli.views.tables import Table
from cli.views.units import human_seconds

if TYPE_CHECKING:  # it loads torch
    from trainer.sweep.ablate import Ablation

PLAIN_EVERY_SECONDS = 5.0


@contextmanager
def watching(console: Console) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What `trainer.loop.fit.fit` calls with each logged object."""
    last, steps, rows_per_step = 0.0, 0, 0

    def watch(line: dict[str, Any]) -> None:
        nonlocal last, steps, rows_per_step
        now = time.monotonic()
        if "begin" in line:
            steps, rows_per_step = line["begin"]["steps"], line["begin"]["rows_per_step"]
            say(console, _describe_start(line["begin"]))
        elif "note" in line:
            say(console, f"note: {line['note']}")
        elif "validation" in line:
            say(console, f"step {line['step']:,} of {steps:,}: {describe_scores(line['validation'])}")
        elif "space_step" in line and now - last >= PLAIN_EVERY_SECONDS:
            last = now
            terms = ", ".join(f"{name} {value:.3f}" for name, value in line["space"].items())
            say(console, f"shared space, step {line['space_step']:,}: {terms}")
        elif "loss" in line and now - last >= PLAIN_EVERY_SECONDS:
            last = now
            left = (steps - line["step"]) * rows_per_step / line["rows_per_second"] if line["rows_per_second"] else 0
            say(console, f"step {line['step']:,} of {steps:,}: {_describe(line)}, {human_seconds(left)} left")

    yield watch


def describe_scores(scores: dict[str, Any]) -> str:
    """R2 of every teacher and of the base, in one line."""
    parts = [
        f"{name} R2 " + "/".join(f"{value:.3f}" for key, value in values.items() if key.startswith("r2_"))
        for name, values in scores["teachers"].items()
    ]
    return ", ".join([*parts, f"base kept {scores['base']['r2']:.3f}"])


def show_fitted(console: Console, out: Path, summary: dict[str, Any]) -> None:
    """What was trained, and how close it is to each teacher on the validation rows."""
    console.print(
        f"trained: {summary['steps']:,} steps on {summary['train_rows']:,} rows, {summary['seconds']:.1f} s, "
        f"{summary['rows_per_second']:,.0f} rows/s, {summary['parameters']:,} parameters",
        markup=False,
        soft_wrap=True,
    )
    planned = summary.get("planned_steps", summary["steps"])  # runs of older releases do not stop early
    if summary["steps"] < planned:
        why = "the last validations were no better than the best one (patience)"
        say(console, f"stopped early, after step {summary['steps']:,} of {planned:,}: {why}")
    scores = summary["validation"]
    outputs = [key for key in scores["base"] if key != "r2"]
    heading = f"R2 on {summary['validation_rows']:,} validation rows"
    table = Table(heading, *(key.removeprefix("r2_") for key in outputs))
    for name, values in [*scores["teachers"].items(), ("the base itself", scores["base"])]:
        table.add_row(name, *(_figure(values[key]) for key in outputs))
    if summary["validation_rows"]:
        table.show(console)
        idle = [name for name, values in scores["teachers"].items() if learned_nothing(values)]
        if idle:
            names = ", ".join(idle)
            say(console, f"warning: {names}: R2 is not above 0, so the student predicts it no better than its mean")
    weights = summary.get("weights")  # runs of older releases keep the last ones
    if weights is not None and summary["validation_rows"]:
        say(console, describe_weights(weights))
    console.print(f"kept in {out}", markup=False, soft_wrap=True)


def learned_nothing(scores: dict[str, Any]) -> bool:
    """Whether no output of a teacher is predicted better than by its mean."""
    return not any(value is not None and value > 0 for key, value in scores.items() if key.startswith("r2_"))


def describe_weights(weights: dict[str, Any]) -> str:
    """Which weights were kept, and how the others did."""
    best, last = weights["best"], weights["last"]
    if best["step"] == last["step"]:
        return f"weights: after step {last['step']:,}, the last and the best (mean R2 {_figure(last['r2'])})"
    kept, other = (best, last) if weights["kept"] == "best" else (last, best)
    name = "best" if kept is best else "last"
    beside = "last" if kept is best else "best"
    return (
        f"weights: after step {kept['step']:,}, the {name} (mean R2 {_figure(kept['r2'])}); beside them in "
        f"{beside}.safetensors the {beside}, after step {other['step']:,} ({_figure(other['r2'])})"
    )


def ablation_table(found: "Ablation") -> Table:
    """Means over seeds, and differences from the first cell with their intervals."""
    table = Table("R2 on validation rows", "cell", "mean", "difference", "95% interval", left=2)
    for row in found.rows:
        known = row.difference is not None and math.isfinite(row.difference)
        difference = f"{row.difference:+.4f}" if known else "-"
        interval = "-" if row.low is None or row.high is None else f"{row.low:+.4f} to {row.high:+.4f}"
        table.add_row(row.figure, row.cell, _figure(row.mean), difference, interval)
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _describe_start(begin: dict[str, Any]) -> str:
    on = begin["device"] if begin["processes"] == 1 else f"{begin['processes']} processes"
    done = f", {begin['done']:,} of them done" if begin["done"] else ""
    return (
        f"train: {begin['steps']:,} steps of {begin['rows_per_step']:,} rows{done}, {begin['rows']:,} rows and "
        f"{begin['validation_rows']:,} for validation, {begin['parameters']:,} parameters, {on}, {begin['precision']}"
    )


def _describe(line: dict[str, Any]) -> str:
    losses = ", ".join(f"{name} {value:.3f}" for name, value in line["s2t"].items())
    return (
        f"loss {line['loss']:.4f} ({losses}), {line['rows_per_second']:,.0f} rows/s, waiting for data "
        f"{line['data_wait']:.0%}"
    )
