"""How evaluations, comparisons and exports look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cli.output import say
from cli.views.tables import Table
from cli.views.units import human_bytes

if TYPE_CHECKING:  # these load torch
    from trainer.evaluation.compare import Compared
    from trainer.export.export import Export

_TEACHER_KEYS = ("agreement", "kappa", "majority", "accuracy", "r2_global", "r2_patch")


def evaluation_tables(found: Mapping[str, Any]) -> list[Table]:
    """Student, frozen base and teachers, on the same rows: by teacher, and by features."""
    keys = [key for key in _TEACHER_KEYS if any(key in each for each in found["teachers"].values())]
    names = (f"R2 {key[3:]}" if key.startswith("r2_") else key for key in keys)
    answers = Table("teacher", "by", *names, left=2)
    subjects = (("student", found), ("frozen base", found["frozen_base"]))
    for name in found["teachers"]:
        for who, scores in subjects:
            answers.add_row(name, who, *(_number(scores["teachers"][name].get(key)) for key in keys))
    features = Table("features of", "linear probe", "k-NN", "effective rank", "base kept, R2", "base kept, kappa")
    for who, scores in subjects:
        kept = scores["base"]
        features.add_row(who, *_probes(scores), _number(kept["r2"]), _number(kept["kappa"]))
    for name, scores in found["teacher_alone"].items():
        features.add_row(f"{name} alone", *_probes(scores), "", "")
    return [answers, features]


def evaluated_rows(found: Mapping[str, Any]) -> str:
    """What was measured."""
    where = ", ".join(found["caches"])
    return f"{found['rows']:,} rows of {where}; probes and linear maps from {found['fitted_rows']:,}"


def show_exported_student(console: Console, exported: Export) -> None:
    """What was checked and what was written."""
    checked = exported.checked
    for who, found, limit in (
        ("base", checked.base, checked.base_limit),
        ("student", checked.student, checked.student_limit),
    ):
        if found:
            parts = ", ".join(f"{output} {value:.4f}" for output, value in found.items())
            say(
                console, f"images against cache, {checked.rows} rows, {who}: {parts} (relative RMSE; limit {limit:.4f})"
            )
    for name, size in exported.files.items():
        say(console, f"  {name}  {human_bytes(size)}")
    for note in exported.notes:
        say(console, f"note: {note}")
    say(console, f"exported: {exported.path}")


def comparison_table(runs: Sequence[Compared]) -> Table:
    """One row a run."""
    teachers = list(dict.fromkeys(name for run in runs for name in run.r2))
    keys = list(dict.fromkeys(key for run in runs for each in run.r2.values() for key in each))
    scores = [f"R2 {name} {key[3:]}" for name in teachers for key in keys]
    transfers = any(run.transfer for run in runs)
    last = ("probe", "k-NN", "rank", *(("rho min", "rho spread") if transfers else ()))
    table = Table("run", "student", "parameters", "rows/s", *scores, "base R2", "base kappa", *last, left=2)
    for run in runs:
        values = run.as_json()
        table.add_row(
            run.name,
            run.kind,
            f"{run.summary['parameters']:,}",
            f"{values['rows_per_second']:,.0f}",
            *(_number(run.r2.get(name, {}).get(key)) for name in teachers for key in keys),
            _number(run.kept["r2"]),
            _number(run.kept.get("kappa")),
            *_probes(run.scores or {}),
            *((_number(values["transfer_min"]), _number(values["transfer_spread"])) if transfers else ()),
        )
    return table


def comparison_notes(runs: Sequence[Compared]) -> list[str]:
    """What sets the runs apart, and which were not evaluated."""
    notes = list(dict.fromkeys(note for run in runs for note in run.notes))
    lacking = [run.name for run in runs if run.scores is None]
    if lacking:
        notes.append(f"{', '.join(lacking)}: not evaluated; R2 is of the run's summary. Run `kpu-train eval`")
    return notes


def _probes(scores: Mapping[str, Any]) -> tuple[str, str, str]:
    rank = scores.get("effective_rank")
    return _number(scores.get("linear_probe")), _number(scores.get("knn")), "-" if rank is None else f"{rank:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
