"""Runs side by side: one line a run, the transfer balance where runs for one teacher are among them, and a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np

from kpu.errors import ConfigError
from kpu.reading.cache import open_cache
from kpu.util.digests import digest_of
from trainer.evaluation.evaluate import evaluation_file
from trainer.evaluation.origin import Origin, differences
from trainer.loop.selection import overall_r2
from trainer.run.measured import check_scores
from trainer.run.runs import RunFolder
from trainer.util.files import replace_file, write_error
from trainer.util.sealed import open_json

_DISTINCT: Final = 0.02  # a teacher whose solo run gains less R2 than this over the frozen base is not divided by

_EVALUATE_AGAIN: Final = "run `kpu-train eval` again"
_SCORES_KEYS: Final = ("teachers", "base", "caches", "rows")


@dataclass(frozen=True)
class Compared:
    """One run. `scores` is what `kpu-train eval` kept, None if it was not run: then R2 is the summary's.

    `transfer` is by teacher rho = (R2 - R2_frozen) / (R2_solo - R2_frozen), R2 the mean over outputs, `solo` the run
    for that teacher alone, of a student of the same kind and model, evaluated on the same rows; of several one with
    the same seed. None without such a run, or where even it gains nothing. `notes` say what sets it apart from others.
    """

    name: str
    kind: str
    model: str | None
    seed: int
    teachers: tuple[str, ...]
    base: str
    summary: dict[str, Any]
    scores: dict[str, Any] | None
    curve: list[tuple[int, dict[str, Any]]]
    origin: Origin
    transfer: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def r2(self) -> dict[str, dict[str, float | None]]:
        """By teacher and `r2_<output>`."""
        teachers = (self.scores or self.summary["validation"])["teachers"]
        return {name: {k: v for k, v in each.items() if k.startswith("r2_")} for name, each in teachers.items()}

    @property
    def kept(self) -> dict[str, float | None]:
        """How much of the base is left: `r2` and, where measured, `kappa`."""
        base: dict[str, float | None] = (self.scores or self.summary["validation"])["base"]
        return base

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "run": self.name,
            "kind": self.kind,
            "base": self.base,
            "parameters": self.summary["parameters"],
            "steps": self.summary["steps"],
            "seconds": self.summary["seconds"],
            "rows_per_second": rate(self.summary),
            "r2": self.r2,
            "kept": self.kept,
            "evaluation": self.scores,
            "transfer": self.transfer,
            "transfer_min": min(self.transfer.values(), default=None),
            "transfer_spread": np.ptp(list(self.transfer.values())) if self.transfer else None,
            "notes": self.notes,
        }


def compare(paths: Sequence[Path], caches: Sequence[str] = ()) -> list[Compared]:
    """Read what finished runs say of themselves and what `kpu-train eval` kept.

    Args:
        paths: folders of runs.
        caches: take the evaluation on these; none: the one on each run's own validation rows.

    Raises:
        ConfigError: there is no finished run, or it was not evaluated on `caches`.
        CorruptError: a file of a run is damaged.
    """
    digest = digest_of([open_cache(path).plan.digest for path in caches]) if caches else None
    named = dict.fromkeys(paths)  # one run may be given twice
    labels = [path.name or str(path.resolve()) for path in named]
    alike = {label for label in labels if labels.count(label) > 1}
    names = {path: str(path) if label in alike else label for path, label in zip(named, labels, strict=True)}
    found = [_read(path, names[path], evaluation_file(digest), required=bool(caches)) for path in paths]
    notes = differences([run.origin for run in found])
    for run in found:
        run.transfer.update(_transfer(run, found))
        run.notes.extend(note for note, about in notes.items() if run.name in about)
    return found


def mean_r2(values: Mapping[str, float | None]) -> float | None:
    """Mean over outputs; None if one is missing."""
    numbers = [value for value in values.values() if value is not None]
    return float(np.mean(numbers)) if numbers and len(numbers) == len(values) else None


def rate(summary: Mapping[str, Any]) -> float:
    """Training rows a second."""
    stated: float | None = summary.get("rows_per_second")
    return stated if stated is not None else round(summary["rows"] / max(summary["seconds"], 1e-3), 1)


def plot(runs: Sequence[Compared], file: Path) -> None:
    """R2 by teacher, base preservation and the course of the validation R2, as an image.

    The course is the mean over the teachers that every run has, so that one run's differs from another's by what it
    learned and not by whom it learned from.

    Raises:
        ConfigError: the kind of the file is unknown.
        FullDiskError: no space is left.
        StorageError: it cannot be written there.
    """
    from matplotlib.figure import Figure  # it takes a while to import

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    bars, course = figure.subplots(1, 2, width_ratios=[3, 2])
    names = list(dict.fromkeys(name for run in runs for name in run.r2))
    common = [name for name in names if all(name in run.teachers for run in runs)]
    groups = [*names, "the base, kept"]
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        heights = [mean_r2(run.r2.get(name, {})) for name in names]
        heights = [np.nan if height is None else height for height in [*heights, run.kept["r2"]]]
        bars.bar(np.arange(len(groups)) + (number - (len(runs) - 1) / 2) * width, heights, width, label=run.name)
        curve = [(step, overall_r2(scores, common)) for step, scores in run.curve]
        if curve and common:
            course.plot(*zip(*curve, strict=True), marker=".", label=run.name)
    bars.set_xticks(range(len(groups)), groups)
    bars.set(title="R2, mean over outputs", ylabel="R2")
    bars.axhline(0, color="black", linewidth=0.8)
    course.set(title=f"mean R2 over {', '.join(common) or 'no common teacher'}, on validation rows", xlabel="step")
    bars.legend(fontsize="small")
    drawn = BytesIO()
    try:
        figure.savefig(drawn, dpi=120, format=file.suffix[1:] or None)
    except ValueError as error:
        raise ConfigError(f"plot: {file}: cannot draw it ({error}); give a path that ends in .png or .svg") from None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, file) from error
    replace_file(file, drawn.getvalue())


def _read(path: Path, label: str, evaluation: str, *, required: bool) -> Compared:
    run = RunFolder(path)
    config, summary = run.config(), run.summary()
    if summary is None:
        raise ConfigError(
            f"{path}: expected a run that ended, found no summary; finish it with `kpu-train fit --resume`"
        )
    scores: dict[str, Any] | None = None
    file = path / evaluation
    if file.exists():
        scores = open_json(file, _SCORES_KEYS, _EVALUATE_AGAIN)
        check_scores(scores, file, _EVALUATE_AGAIN)
    elif required:
        raise ConfigError(
            f"{path}: expected an evaluation on this cache, found none; run `kpu-train eval` with --cache"
        )
    curve = [(line["step"], line["validation"]) for line in run.metrics() if "validation" in line]
    for _, logged in curve:
        check_scores(logged, path / "metrics.jsonl", "remove the line")
    if summary["validation_rows"]:
        curve.append((summary["steps"], summary["validation"]))
    teachers = tuple(summary["validation"]["teachers"])
    rows = summary["validation_rows"] if scores is None else scores["rows"]
    origin = Origin.of(label, run, config, scores if required else None, rows)
    student = config.student
    return Compared(
        label, student.kind, student.model, config.seed, teachers, config.base, summary, scores, curve, origin
    )


def _transfer(run: Compared, others: Sequence[Compared]) -> dict[str, float]:
    """Rho by teacher, for the teachers that have a run of their own among `others`; none without controls."""
    found: dict[str, float] = {}
    by_frozen = (run.scores or {}).get("frozen_base", {}).get("teachers", {})
    for name in run.teachers:
        solo = _solo(run, name, others)
        if solo is None or name not in run.r2:
            continue
        frozen = mean_r2(_r2_of(by_frozen.get(name, {})))
        own, best = mean_r2(run.r2[name]), mean_r2(solo.r2.get(name, {}))
        if frozen is not None and own is not None and best is not None and best - frozen > _DISTINCT:
            found[name] = (own - frozen) / (best - frozen)
    return found


def _solo(run: Compared, name: str, others: Sequence[Compared]) -> Compared | None:
    """The run that `run` is divided by for a teacher: itself, if it is for that teacher alone."""
    alike = [
        other
        for other in (run, *others)
        if set(other.teachers) == {run.base, name}
        and (other.base, other.kind, other.model) == (run.base, run.kind, run.model)
        and other.scores is not None
        and other.origin.measured == run.origin.measured
    ]
    return min(alike, key=lambda other: (other is not run, other.seed != run.seed), default=None)


def _r2_of(scores: Mapping[str, Any]) -> dict[str, float | None]:
    return {key: value for key, value in scores.items() if key.startswith("r2_")}
