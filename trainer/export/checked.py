"""Whether a student gives on images what it gave on cached features.

Letters: B rows.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kpu.errors import MismatchError
from trainer.data.corpus import Corpus
from trainer.data.images import normalise
from trainer.data.loading import Batch, DeviceTransfer
from trainer.data.resident import RowNumbers
from trainer.evaluation.trained import Trained
from trainer.export.exported import ExportedStudent
from trainer.export.program import SAME, relative_rmse
from trainer.students.parallel import ParallelStudent

_REDUCED: Final = {"fp32": 0.005, "bf16": 0.05, "fp16": 0.01}
"""Root mean square error, in standard deviations, that the precision of an extraction, or of a codec, may explain."""
_BASE_FACTOR: Final = 2.0
_STUDENT_FACTOR: Final = 4.0  # an adapter may amplify what storing the base cost


@dataclass(frozen=True)
class Checked:
    """How far the image path is from the cached path over `rows` rows, relative root mean square errors by output.

    `base` compares the base's standardised outputs, `student` the features; the limits are what they had to stay below.
    """

    rows: int
    base: dict[str, float]
    student: dict[str, float]
    base_limit: float
    student_limit: float


def check_paths(trained: Trained, module: ExportedStudent, corpus: Corpus, rows: RowNumbers, pixels: Tensor) -> Checked:
    """Compare what the module makes of images with what was trained makes of cached features of the same rows.

    A cache with the grid `uniform` of `step` standard deviations holds features with a root mean square error of
    step / sqrt(12); the extraction's precision adds its own. The base on images must agree with the cache within twice
    that, the student within four times, relative to the root mean square of the cached path: another base, other
    weights or another preprocessing are off by tens of per cent.

    Raises:
        MismatchError: naming output, figure and limit.
    """
    batch = DeviceTransfer(corpus, torch.device("cpu"))(corpus.fetch(rows))
    spec = trained.sources[trained.config.base].spec
    codec = corpus.caches[0].teachers[spec.name].spec.codec
    stored = codec.step / 12**0.5 if codec.step is not None else _REDUCED[codec.name]
    expected = stored + _REDUCED[spec.precision]
    student = trained.model.student
    cached = batch.targets[spec.name]
    with torch.no_grad():
        x_BCHW = normalise(pixels, module.description.input)
        if isinstance(student, ParallelStudent):
            with student.bare():
                base = student({}, x_BCHW)
        else:
            base = module.base_features(x_BCHW)
        from_images = {o: z for o, z in module(pixels).items() if o in trained.config.outputs}
        from_cache = trained.model.encode(Batch(rows, rows, batch.targets, batch.weights, x_BCHW))
    limit = SAME if student.needs_images else _STUDENT_FACTOR * expected
    checked = Checked(
        len(rows),
        {o: relative_rmse(y, cached[o]) for o, y in base.items()},
        {o: relative_rmse(z, from_cache[o]) for o, z in from_images.items()},
        _BASE_FACTOR * expected,
        limit,
    )
    require_near(checked.base, checked.base_limit, f"base {spec.name!r}")
    require_near(checked.student, checked.student_limit, "student")
    return checked


def require_near(found: dict[str, float], limit: float, who: str) -> None:
    """Raises MismatchError if a figure by output is above the limit, or is no number."""
    for output, figure in found.items():
        if not figure <= limit:  # also where it is not a number
            raise MismatchError(
                f"{who}: {output}: expected features from images within {limit:.3g} of those from the cache (relative "
                f"root mean square error), found {figure:.3g}; give the images, and the base, that the cache was "
                "extracted from; nothing was written"
            )
