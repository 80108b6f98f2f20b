"""A run that ended: its configuration, its teachers and the model that it kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from cache.errors import MismatchError
from trainer.config import TrainConfig
from trainer.corpus import Source
from trainer.model import Inheritance
from trainer.runs import MODEL, RunFolder
from trainer.students.weights import RANDOM, differences

_NAMED_AT_MOST: Final = 5


@dataclass(frozen=True)
class Trained:
    """What a run learned; `model` is in evaluation mode, on the CPU; `notes` say what could not be checked."""

    run: RunFolder
    config: TrainConfig
    sources: dict[str, Source]
    model: Inheritance
    notes: list[str]


def load_trained(path: Path) -> Trained:
    """Load a run from its folder alone; neither its caches nor the files that its weights came from are needed.

    A `torch:` student needs the file that defines it.

    Raises:
        ConfigError: there is no run, or it has not ended.
        CorruptError: a file of it is damaged.
        MismatchError: the kept model does not fit the configuration beside it.
    """
    run = RunFolder(path)
    config, sources, state = run.config(), run.sources(), run.model()
    unchecked = run.unchecked()
    notes = [f"{', '.join(unchecked)}: the run keeps no digest, so that damage would not show"] if unchecked else []
    model = _rebuild(config, sources, state)
    model.load_state_dict(state)
    return Trained(run, config, sources, model.eval(), notes)


def _rebuild(config: TrainConfig, sources: dict[str, Source], state: dict[str, Tensor]) -> Inheritance:
    """A model that `state` fits."""
    found: list[str] = []
    # Every weight is in the run: those that training began with matter only where they decide a shape.
    own = config.student.weights
    for weights in dict.fromkeys([RANDOM, own] if config.student.kind in ("parallel", "full") else [own]):
        student = config.student.model_copy(update={"weights": weights})
        model = Inheritance(config.model_copy(update={"student": student}), sources)
        found = differences(model, state)
        if not found:
            return model
    listed = "; ".join(found[:_NAMED_AT_MOST])
    raise MismatchError(f"{MODEL}: {listed}; the code of the student, or a library, is not that of the training")
