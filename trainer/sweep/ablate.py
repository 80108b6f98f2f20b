"""Many trainings that differ in a few keys, and what the differences are worth.

Every training is a plain `fit` into `<out>/<number of the cell>-<what it sets>-seed<seed>`. Cells are compared seed by
seed: the same seed means the same batches and initial values, so that differences vary less than the figures do.
"""

import math
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.stats import t as student_t

from kpu.errors import ConfigError, IncompleteError, KpuError, MismatchError
from kpu.trust.code import naming_models
from kpu.trust.list import Trust, load_trust
from trainer.data.corpus import Corpus
from trainer.data.resident import free_memory
from trainer.data.targets import choose_outputs
from trainer.loop.fit import choose_teachers, fit
from trainer.run.runs import RunFolder
from trainer.sweep.sweeps import TRIAL_NAME, Sweep, SweepTrial, name_of
from trainer.util.files import refuse_links, remove_folder, replace_file, write_error
from trainer.util.sealed import dump_json

LEVEL: Final = 0.95
_TABLE, _RAY = "ablation.json", ".ray"

_Work = Callable[..., str | None]
"""Does the training of a number."""


@dataclass(frozen=True)
class Row:
    """A figure of a cell: its mean over seeds and, but for the first cell, the paired difference from the first.

    `seeds` is how many trainings gave the figure; the mean of none is NaN. `low` and `high` bound the mean difference
    with a confidence of 95%, by Student's t distribution over the seeds that both cells have; None for fewer than two.
    """

    cell: str
    figure: str
    mean: float
    seeds: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Ablation:
    """The table of a sweep; rows of one figure follow one another, cell after cell. `trials` names the runs."""

    out: Path
    rows: tuple[Row, ...]
    trials: tuple[dict[str, Any], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values, null where a number is none."""
        rows = [
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in row.items()
            }
            for row in map(asdict, self.rows)
        ]
        return {"out": str(self.out), "runs": list(self.trials), "rows": rows}


def ablate(
    sweep: Sweep,
    *,
    address: str | None = None,
    tell: Callable[[str], None] | None = None,
    trust: Trust | None = None,
) -> Ablation:
    """Do every training that has not ended yet, and compare the cells; the table is kept as `ablation.json`, too.

    `trust` says which code may run; by default what the user's list has, and what the sweep names.

    Raises:
        ConfigError: a training cannot be done, and none has ended; or there is no such Ray cluster; or other files than
            those of a sweep exist at `out`.
        MismatchError: a folder of this sweep holds a training of another one; nothing was changed.
        IncompleteError: some trainings failed; those that ended are kept, and so is their table.
    """
    _require_own(sweep.out)
    try:
        sweep.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, sweep.out) from error
    if sweep.executor == "ray":
        sweep = replace(sweep, trials=tuple(map(_on_own_cores, sweep.trials)))
    waiting = [trial for trial in sweep.trials if not _ended(sweep, trial)]
    say = tell or (lambda _: None)
    say(f"{len(sweep.trials)} trainings: {len(sweep.cells)} cells, {len(sweep.seeds)} seeds, {len(waiting)} to do")
    if trust is None:
        trust = naming_models(load_trust(), *(trial.config.student.model for trial in sweep.trials))
    work = partial(run_trial, [(trial, sweep.out / trial.name) for trial in waiting], trust=trust)
    failures = _by_ray(sweep, waiting, work, address) if sweep.executor == "ray" else _inline(waiting, work, say)
    reasons = "; ".join(f"{trial.name} ({name_of(sweep.cells[trial.cell])}): {why}" for trial, why in failures)
    what = f"{len(failures)} of {len(sweep.trials)} trainings failed: {reasons}; the same command goes on with these"
    if len(failures) == len(sweep.trials):
        raise ConfigError(what)
    trials = [_describe(sweep, trial) for trial in sweep.trials]
    rows = compare(sweep, [_figures(sweep, trial) for trial in sweep.trials])
    found = Ablation(sweep.out, tuple(rows), tuple(trials))
    replace_file(sweep.out / _TABLE, dump_json(found.as_json()))
    if failures:
        raise IncompleteError(f"{what}; the table of the others is {sweep.out / _TABLE}")
    return found


def compare(sweep: Sweep, figures: list[dict[str, float]]) -> list[Row]:
    """The table of `figures`, one mapping for each of `sweep.trials`, empty for one that failed."""
    rows = []
    for figure in dict.fromkeys(figure for found in figures for figure in found):
        values = np.full((len(sweep.cells), len(sweep.seeds)), np.nan)
        for trial, found in zip(sweep.trials, figures, strict=True):
            values[trial.cell, sweep.seeds.index(trial.seed)] = found.get(figure, np.nan)
        for number, cell in enumerate(sweep.cells):
            known = values[number][np.isfinite(values[number])]
            row = Row(name_of(cell), figure, float(known.mean()) if len(known) else math.nan, len(known))
            rows.append(row if number == 0 else _against(row, values[number] - values[0]))
    return rows


def _against(row: Row, differences: "np.ndarray[Any, Any]") -> Row:
    """The row with the mean difference and its interval."""
    known = differences[np.isfinite(differences)]
    mean = float(known.mean()) if len(known) else math.nan
    if len(known) < 2:
        return replace(row, difference=mean)
    half = reach(known)
    return replace(row, difference=mean, low=mean - half, high=mean + half)


def reach(differences: "np.ndarray[Any, Any]") -> float:
    """How far the 95% interval of their mean reaches to either side, t s / sqrt(n) with n - 1 degrees of freedom.

    NaN for less than two differences.
    """
    count = len(differences)
    if count < 2:
        return math.nan
    return float(student_t.ppf((1 + LEVEL) / 2, count - 1) * differences.std(ddof=1) / math.sqrt(count))


def run_trial(
    trials: list[tuple[SweepTrial, Path]], number: int, beside: int = 1, trust: Trust | None = None
) -> str | None:
    """Begin a training, or go on with it; why it failed, None if it did not.

    `beside` trainings, this one included, share the memory of this machine; `trust` is as for `fit`.
    """
    trial, path = trials[number]
    config = trial.config
    if beside > 1 and config.loader.memory == "auto":
        loader = config.loader.model_copy(update={"memory": free_memory(beside)})
        config = config.model_copy(update={"loader": loader})
    try:
        fit(config, path, resume=RunFolder(path).begun, trust=trust)
    except KpuError as error:
        return str(error)
    except RuntimeError as error:  # PyTorch's own, as where memory is full: other trainings may still end
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def _inline(waiting: list[SweepTrial], work: _Work, say: Callable[[str], None]) -> list[tuple[SweepTrial, str]]:
    failures = []
    for number, trial in enumerate(waiting):
        failure = work(number)
        say(f"{trial.name}: {failure or 'done'}")
        if failure is not None:
            failures.append((trial, failure))
    return failures


def _by_ray(sweep: Sweep, waiting: list[SweepTrial], work: _Work, address: str | None) -> list[tuple[SweepTrial, str]]:
    if not waiting:
        return []
    from trainer.ray_train import run_trials  # the one module that knows Ray

    threads = max(int(trial.config.threads) for trial in waiting)
    storage = sweep.out / _RAY
    refuse_links(sweep.out, [_RAY])
    found = run_trials(work, len(waiting), storage=storage, address=address, threads=threads)
    remove_folder(sweep.out, _RAY)
    return [(trial, why) for trial, why in zip(waiting, found, strict=True) if why is not None]


def _on_own_cores(trial: SweepTrial) -> SweepTrial:
    """Trainings side by side must not take all cores each."""
    if trial.config.threads != "auto":
        return trial
    return replace(trial, config=trial.config.model_copy(update={"threads": 1}))


def _require_own(out: Path) -> None:
    """Raises ConfigError if `out` holds files and none is of a sweep; beside a sweep there may be others."""
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if names and not any(name in (_TABLE, _RAY) or TRIAL_NAME.fullmatch(name) for name in names):
        raise ConfigError(
            f"out: {out}: expected a new path, an empty folder or that of a sweep, found other files ({names[0]}); "
            "choose another"
        )


def _ended(sweep: Sweep, trial: SweepTrial) -> bool:
    """Whether a training has ended.

    Raises:
        MismatchError: the run in its folder was begun with another configuration or other caches.
    """
    run = RunFolder(sweep.out / trial.name)
    if not run.begun:
        return False
    config = choose_teachers(trial.config, run.path, resume=True)
    difference = run.difference(config, Corpus(config.caches, choose_outputs(config), config.base))
    if difference is not None:
        raise MismatchError(
            f"out: {run.path}: expected the training of {name_of(sweep.cells[trial.cell])} with seed {trial.seed}, "
            f"found another: {difference}; choose another `out`"
        )
    return run.summary() is not None


def _describe(sweep: Sweep, trial: SweepTrial) -> dict[str, Any]:
    """Where a training is kept, and what it was of."""
    cell = sweep.cells[trial.cell]
    return {"folder": trial.name, "cell": name_of(cell), "set": cell, "seed": trial.seed}


def _figures(sweep: Sweep, trial: SweepTrial) -> dict[str, float]:
    """The scores of a training on its validation rows, by flat names such as `general r2_global`; none if it failed."""
    summary = RunFolder(sweep.out / trial.name).summary()
    if summary is None:
        return {}
    scores = summary["validation"]
    sections = {**scores["teachers"], "base kept": {k: v for k, v in scores["base"].items() if k != "r2"}}
    return {
        f"{name} {key.removeprefix('r2_')}": math.nan if value is None else float(value)
        for name, values in sections.items()
        for key, value in values.items()
    }
