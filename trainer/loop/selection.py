"""Which weights of a training are kept: the best by validation rows, or the last.

`best/step-<number>/` in the run's folder holds the weights that predicted the teachers best so far, and their scores.
It appears by a rename once all of it is synced.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.torch import load as load_tensors

from kpu.errors import CorruptError
from kpu.util.digests import digest
from trainer.config import TrainConfig
from trainer.data.resident import RowNumbers
from trainer.loop.world import World
from trainer.model import Inheritance
from trainer.run.checkpoint import pack_tensors
from trainer.run.runs import MODEL
from trainer.util.files import publish_folder, remove_folder
from trainer.util.sealed import ADVICE, DIGESTS, digests_in, open_json, read_sealed, seal_json

VALIDATIONS: Final = 20  # in a training, if nobody says how many
_ROWS_BETWEEN: Final = 10  # training rows for each validation row, at least: scoring then costs about 3% of a training
LAST: Final = "last.safetensors"
"""The weights after the last step, where others were chosen."""
_OURS: Final = re.compile(r"step-\d{9,}|\.step-\d{9,}\.\w+")
BEST: Final = "best.safetensors"
"""Those of the best validation, where others were chosen."""
_SCORES: Final = "scores.json"


@dataclass(frozen=True)
class Best:
    """The best validation so far: after which step, its mean R2, and its folder."""

    step: int
    r2: float
    folder: Path

    def tensors(self) -> bytes:
        """The weights, as safetensors.

        Raises:
            CorruptError: the file is damaged or missing.
        """
        return read_sealed(self.folder / MODEL, _scores_of(self.folder)[DIGESTS][MODEL])


class Selection:
    """Follows the validations of a training, and says when it may stop.

    `rows` are scored on the way; without any nothing is due, and the last weights are kept.
    """

    def __init__(self, config: TrainConfig, world: World, folder: Path, steps: int, rows: RowNumbers) -> None:
        self._config, self._world, self._folder, self._steps = config, world, folder, steps
        self.rows, self.every = rows, validation_interval(config, steps, len(rows))
        self.best = _find(folder)
        self._since = 0

    def due(self, step: int) -> bool:
        """Whether validation rows are to be scored after `step`, which is not the last."""
        return self.every is not None and step % self.every == 0 and step < self._steps

    @property
    def exhausted(self) -> bool:
        """Whether `patience` is at its end: that many validations, one after another, were no better than the best."""
        patience = self._config.patience
        return patience is not None and self._since >= patience

    def replay(self, lines: list[dict[str, Any]]) -> None:
        """Take in what a run that is resumed has logged."""
        after = -1 if self.best is None else self.best.step
        self._since = sum("validation" in line and line["step"] > after for line in lines)

    def offer(self, step: int, scores: Mapping[str, Any], model: Inheritance) -> None:
        """Keep the weights of `model` if no validation was better than this one, after `step`."""
        r2 = overall_r2(scores)
        better = math.isfinite(r2) and (self.best is None or r2 > self.best.r2)
        folder = self._folder / f"step-{step:09d}"

        def keep() -> None:
            tensors = pack_tensors(model.state_dict())
            document = {"step": step, "r2": r2, DIGESTS: {MODEL: digest(tensors)}}
            publish_folder(folder, {MODEL: tensors, _SCORES: seal_json(document)})
            for former in self._folder.iterdir():
                if former != folder and _OURS.fullmatch(former.name):
                    remove_folder(self._folder.parent, f"{self._folder.name}/{former.name}")

        if self._world.agree(better):
            self._world.lead(keep)
            self.best, self._since = Best(step, r2, folder), 0
        elif self.best is None or self.best.step < step:  # a resumed run may have the best of later steps already
            self._since += 1

    def keeps_best(self, last: Mapping[str, Any]) -> Best | None:
        """The best state, if it predicted `rows` better than the last one, which has these scores; None otherwise."""
        r2 = overall_r2(last)
        beaten = self.best is not None and not (math.isfinite(r2) and r2 >= self.best.r2)
        return self.best if self._world.agree(beaten) else None

    @property
    def keep(self) -> str:
        """`best` or `last`."""
        return self._config.keep


def choose_weights(
    selection: Selection,
    model: Inheritance,
    step: int,
    validation_rows: RowNumbers,
    measure: Callable[[RowNumbers], dict[str, Any]],
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Choose between the best and the last weights of a training that ended.

    Args:
        selection: what was validated on the way.
        model: the last state, after `step`; it has the chosen weights afterwards.
        step: of the last state.
        validation_rows: all of them, of which the selection looked at some.
        measure: scores of `model` on rows.

    Returns:
        Files of weights by name, and what the summary says: `validation`, the scores of the chosen weights, and
        `weights`, which of them were chosen and why.

    Raises:
        CorruptError: the best weights were damaged since they were kept.
    """
    last = measure(selection.rows)
    files = {MODEL: pack_tensors(model.state_dict())}
    figures: dict[str, Any] = {"kept": "last", "last": {"step": step, "r2": overall_r2(last)}}
    best = selection.keeps_best(last)
    figures["best"] = figures["last"] if best is None else {"step": best.step, "r2": best.r2}
    if best is not None and selection.keep == "best":
        figures["kept"] = "best"
        files = {MODEL: best.tensors(), LAST: files[MODEL]}
        model.load_state_dict(load_tensors(files[MODEL]))
    elif best is not None:
        files[BEST] = best.tensors()
    known = figures["kept"] == "last" and len(selection.rows) == len(validation_rows)
    return files, {"validation": last if known else measure(validation_rows), "weights": figures}


def validation_interval(config: TrainConfig, steps: int, validation_rows: int) -> int | None:
    """Steps from one validation to the next; None without validation rows.

    `auto` gives some twenty validations, fewer where these would take a large part of the time.
    """
    if validation_rows == 0:
        return None
    if config.validate_every != "auto":
        return config.validate_every
    rows_per_step = config.batch_size * config.optim.accumulate
    return max(1, -(-steps // VALIDATIONS), -(-_ROWS_BETWEEN * validation_rows // rows_per_step))


def overall_r2(scores: Mapping[str, Any], teachers: Collection[str] | None = None) -> float:
    """Mean R2 over outputs and teachers, or those named; NaN if one is missing."""
    chosen = [each for name, each in scores["teachers"].items() if teachers is None or name in teachers]
    values = [v for each in chosen for k, v in each.items() if k.startswith("r2_")]
    return float(np.mean([np.nan if value is None else value for value in values])) if values else math.nan


def _find(folder: Path) -> Best | None:
    """The best that is kept; damaged ones are passed over."""
    found = []
    for path in folder.glob("step-*"):
        if path.is_symlink():
            continue
        try:
            scores = _scores_of(path)
            found.append(Best(scores["step"], scores["r2"], path))
        except CorruptError:
            continue
    return max(found, key=lambda best: best.r2, default=None)


def _scores_of(folder: Path) -> dict[str, Any]:
    found = open_json(folder / _SCORES, ("step", "r2", DIGESTS))
    if type(found["step"]) is int and isinstance(found["r2"], float) and MODEL in digests_in(found, folder / _SCORES):
        return found
    raise CorruptError(str(folder / _SCORES), f"expected a step, an R2 and digests, found other values; {ADVICE}")
