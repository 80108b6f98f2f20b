"""How a training looks: a line every few seconds, and a table at the end."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cli.tables import Table

if TYPE_CHECKING:  # it loads torch
    from trainer.ablate import Ablation

PLAIN_EVERY_SECONDS = 5.0


@contextmanager
def watching(console: Console) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What `trainer.loop.fit` calls with each logged object."""
    last = 0.0

    def watch(line: dict[str, Any]) -> None:
        nonlocal last
        now = time.monotonic()
        if "note" in line:
            console.print(f"note: {line['note']}", markup=False, soft_wrap=True)
        elif "validation" in line:
            console.print(f"step {line['step']:,}: {describe_scores(line['validation'])}", markup=False, soft_wrap=True)
        elif now - last >= PLAIN_EVERY_SECONDS:
            last = now
            console.print(_describe(line), markup=False, soft_wrap=True)

    yield watch


def describe_scores(scores: dict[str, Any]) -> str:
    """R2 of every teacher and of the base, in one line."""
    parts = [
        f"{name} R2 " + "/".join(f"{value:.3f}" for key, value in values.items() if key.startswith("r2_"))
        for name, values in scores["teachers"].items()
    ]
    return ", ".join([*parts, f"base kept {scores['base']['r2']:.3f}"])


def show_summary(console: Console, out: Path, summary: dict[str, Any]) -> None:
    """What was trained, and how close it is to each teacher on the validation rows."""
    console.print(
        f"trained: {summary['steps']:,} steps on {summary['train_rows']:,} rows, {summary['seconds']:.1f} s, "
        f"{summary['rows_per_second']:,.0f} rows/s, {summary['parameters']:,} parameters",
        markup=False,
        soft_wrap=True,
    )
    scores = summary["validation"]
    outputs = [key for key in scores["base"] if key != "r2"]
    heading = f"R2 on {summary['validation_rows']:,} validation rows"
    table = Table(heading, *(key.removeprefix("r2_") for key in outputs))
    for name, values in [*scores["teachers"].items(), ("the base itself", scores["base"])]:
        table.add_row(name, *(_figure(values[key]) for key in outputs))
    if summary["validation_rows"]:
        table.show(console)
    console.print(f"kept in {out}", markup=False, soft_wrap=True)


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


def _describe(line: dict[str, Any]) -> str:
    if "space_step" in line:
        terms = ", ".join(f"{name} {value:.3f}" for name, value in line["space"].items())
        return f"shared space, step {line['space_step']:,}: {terms}"
    losses = ", ".join(f"{name} {value:.3f}" for name, value in line["s2t"].items())
    return (
        f"step {line['step']:,}: loss {line['loss']:.4f} ({losses}), {line['rows_per_second']:,.0f} rows/s, waiting "
        f"for data {line['data_wait']:.0%}"
    )
