"""A run that ended: its configuration, its teachers and the model that it kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from kpu.errors import MismatchError
from kpu.storage.places import require_plain
from kpu.torch.weights import RANDOM, differences
from kpu.trust.code import CodeLoader
from kpu.trust.list import Trust
from trainer.config import TrainConfig
from trainer.data.corpus import TeacherInfo
from trainer.model import Inheritance
from trainer.run.runs import MODEL, RunFolder

_NAMED_AT_MOST: Final = 5


@dataclass(frozen=True)
class Trained:
    """What a run learned; `model` is in evaluation mode, on the CPU; `notes` say what could not be checked.

    `codes` has read the code of the student, and runs that of the base.
    """

    run: RunFolder
    config: TrainConfig
    sources: dict[str, TeacherInfo]
    model: Inheritance
    notes: list[str]
    codes: CodeLoader

    @property
    def caches(self) -> tuple[str, ...]:
        """Where the run found its caches.

        Raises:
            ConfigError: its files name another place than a folder or an object store.
        """
        for place in self.config.caches:
            advice = "give the cache with --cache, or write where it is into that file"
            require_plain(place, said_by=f"{self.run.path}/config.yaml: caches", advice=advice)
        return self.config.caches

    @property
    def images_root(self) -> str | None:
        """Where the run found its images, if it was told. Raises as `caches`."""
        root = self.config.images.root
        if root is not None:
            require_plain(root, said_by=f"{self.run.path}/config.yaml: images.root", advice="give it with --images")
        return root


def load_trained(path: Path, trust: Trust | None = None) -> Trained:
    """Load a run from its folder alone; neither its caches nor the files that its weights came from are needed.

    A `torch:` student needs the file that defines it, which is run if `trust` lets it; by default if the user's list
    has it.

    Raises:
        TrustError: the student's code may not run.
        ConfigError: there is no run, or it has not ended.
        CorruptError: a file of it is damaged.
        MismatchError: the kept model does not fit the configuration beside it, or the code is another than it was.
    """
    run = RunFolder(path)
    config, sources, state = run.config(), run.sources(), run.model()
    unchecked = run.unchecked()
    notes = [f"{', '.join(unchecked)}: the run keeps no digest, so that damage would not show"] if unchecked else []
    codes = CodeLoader(trust, run.code())
    model = _rebuild(config, sources, state, codes)
    model.load_state_dict(state)
    return Trained(run, config, sources, model.eval(), notes, codes)


def _rebuild(
    config: TrainConfig, sources: dict[str, TeacherInfo], state: dict[str, Tensor], codes: CodeLoader
) -> Inheritance:
    """A model that `state` fits."""
    found: list[str] = []
    # Every weight is in the run: those that training began with matter only where they decide a shape.
    own = config.student.weights
    for weights in dict.fromkeys([RANDOM, own] if config.student.kind in ("parallel", "full") else [own]):
        student = config.student.model_copy(update={"weights": weights})
        model = Inheritance(config.model_copy(update={"student": student}), sources, codes)
        found = differences(model, state)
        if not found:
            return model
    listed = "; ".join(found[:_NAMED_AT_MOST])
    raise MismatchError(f"{MODEL}: {listed}; the code of the student, or a library, is not that of the training")
