"""How evaluations, comparisons and exports look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cli.units import human_bytes

if TYPE_CHECKING:  # these load torch
    from trainer.evaluation.compare import Compared
    from trainer.exporting.export import Export

_TEACHER_KEYS = ("agreement", "kappa", "majority", "accuracy", "r2_global", "r2_patch")


def show_evaluation(console: Console, found: Mapping[str, Any]) -> None:
    """Student, frozen base and teachers, on the same rows."""
    where = ", ".join(found["caches"])
    _say(console, f"{found['rows']:,} rows of {where}; probes and linear maps from {found['fitted_rows']:,}")
    keys = [key for key in _TEACHER_KEYS if any(key in each for each in found["teachers"].values())]
    table = _table("teacher", "by", *(key.removeprefix("r2_") if key[:3] != "r2_" else f"R2 {key[3:]}" for key in keys))
    for name in found["teachers"]:
        for who, scores in (("student", found), ("frozen base", found["frozen_base"])):
            table.add_row(name, who, *(_number(scores["teachers"][name].get(key)) for key in keys))
    console.print(table)
    table = _table("", "linear probe", "k-NN", "effective rank", "base kept, R2", "base kept, kappa")
    for who, scores in (("student", found), ("frozen base", found["frozen_base"])):
        kept = scores["base"]
        table.add_row(who, *_probes(scores), _number(kept["r2"]), _number(kept["kappa"]))
    for name, scores in found["teacher_alone"].items():
        table.add_row(f"{name} alone", *_probes(scores), "", "")
    console.print(table)
    for note in found["notes"]:
        _say(console, f"note: {note}")


def show_export(console: Console, exported: Export) -> None:
    """What was checked and what was written."""
    checked = exported.checked
    for who, found, limit in (
        ("base", checked.base, checked.base_limit),
        ("student", checked.student, checked.student_limit),
    ):
        if found:
            parts = ", ".join(f"{output} {value:.4f}" for output, value in found.items())
            _say(
                console, f"images against cache, {checked.rows} rows, {who}: {parts} (relative RMSE; limit {limit:.4f})"
            )
    for name, size in exported.files.items():
        _say(console, f"  {name}  {human_bytes(size)}")
    for note in exported.notes:
        _say(console, f"note: {note}")
    _say(console, f"exported: {exported.path}")


def show_comparison(console: Console, runs: Sequence[Compared]) -> None:
    """One line a run."""
    teachers = list(dict.fromkeys(name for run in runs for name in run.r2))
    keys = list(dict.fromkeys(key for run in runs for each in run.r2.values() for key in each))
    columns = [f"{name} {key[3:]}" for name in teachers for key in keys]
    heading = _table("run", "student", "parameters", "rows/s", *(f"R2 {c}" for c in columns), "base R2", "base kappa")
    transfers = any(run.transfer for run in runs)
    for name in ("probe", "k-NN", "rank", *(("rho min", "rho spread") if transfers else ())):
        heading.add_column(name, justify="right")
    for run in runs:
        values, scores = run.as_json(), run.scores or {}
        heading.add_row(
            run.name,
            run.kind,
            f"{run.summary['parameters']:,}",
            f"{values['rows_per_second']:,.0f}",
            *(_number(run.r2.get(name, {}).get(key)) for name in teachers for key in keys),
            _number(run.kept["r2"]),
            _number(run.kept.get("kappa")),
            *_probes(scores),
            *((_number(values["transfer_min"]), _number(values["transfer_spread"])) if transfers else ()),
        )
    console.print(heading)
    for note in dict.fromkeys(note for run in runs for note in run.notes):
        _say(console, f"note: {note}")
    lacking = [run.name for run in runs if run.scores is None]
    if lacking:
        _say(console, f"note: {', '.join(lacking)}: not evaluated; R2 is of the run's summary. Run `kpu-train eval`")


def _probes(scores: Mapping[str, Any]) -> tuple[str, str, str]:
    rank = scores.get("effective_rank")
    return _number(scores.get("linear_probe")), _number(scores.get("knn")), "-" if rank is None else f"{rank:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "teacher", "by", "run", "student") else "right")
    return table


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)
