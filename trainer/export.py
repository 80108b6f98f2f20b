"""`kpu-train export`, from top to bottom: rebuild the base, join it to the student, compare, write.

What is exported runs on images; what was trained ran on the cache. The two are compared on cached rows before anything
is published: see `check_paths`.

Letters: B rows.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from cache.digests import digest
from cache.errors import ConfigError, MismatchError
from trainer.assemble import assemble
from trainer.card import write_card
from trainer.checkpoint import pack_tensors
from trainer.corpus import Corpus
from trainer.data import Batch, Upload
from trainer.description import CONFIG, STUDENT
from trainer.exported import ExportedStudent, load_student
from trainer.files import publish_folder, write_error
from trainer.images import ImageReader, normalise
from trainer.measured import wanted_outputs
from trainer.program import PROGRAM, SAME, make_program, relative_rmse
from trainer.resident import Rows
from trainer.students.parallel import ParallelStudent
from trainer.trained import Trained, load_trained

CARD: Final = "README.md"
CHECKED_ROWS: Final = 32
_LOOKED_AT: Final = 1024

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


@dataclass(frozen=True)
class Export:
    """What was written: sizes in bytes by file, and what the check found. `notes` says what was left out, and why."""

    path: Path
    files: dict[str, int]
    checked: Checked
    notes: list[str] = field(default_factory=list)


def export(
    run: Path, out: Path, *, bundle: bool | None = None, images: str | None = None, program: bool = True
) -> Export:
    """Write the student of a run as its user runs it, on images, to the folder `out`.

    Args:
        run: the folder of a run that ended.
        out: a folder that does not exist yet.
        bundle: whether the base's weights go along; None: where they are under 2 GB. A base that is not bundled is
            named by model, weights and digest.
        images: stands in for the root that the caches remember.
        program: whether a torch.export program is written, too.

    Raises:
        ConfigError: there is no finished run, something stands at `out`, or the base cannot be built here.
        MismatchError: the image path gives other features than the cached path, or the base is not the cache's.
        SourceError: the images cannot be read.
    """
    if out.exists():
        raise ConfigError(f"out: {out}: expected a path where nothing stands, found something; choose another")
    trained = load_trained(run)
    module, files = assemble(trained, bundle=bundle)
    corpus, rows = _rows(trained)
    pixels = _pixels(corpus, rows, module, images or trained.config.images.root)
    checked = check_paths(trained, module, corpus, rows, pixels)
    files[STUDENT] = pack_tensors(module.own_state())
    notes = []
    if program:
        try:
            files[PROGRAM] = make_program(module, pixels)
        except Exception as error:  # anyone's model may hold what torch cannot trace
            notes.append(f"no {PROGRAM}: torch.export refused ({type(error).__name__}: {str(error)[:200]})")
    description = module.description.model_copy(
        update={"digests": {name: digest(data) for name, data in files.items()}}
    )
    files[CONFIG] = (description.model_dump_json(indent=1) + "\n").encode()
    files[CARD] = write_card(trained, description, checked, notes).encode()
    _publish(out, files, module, pixels)
    return Export(out, {name: len(data) for name, data in files.items()}, checked, notes)


def check_paths(trained: Trained, module: ExportedStudent, corpus: Corpus, rows: Rows, pixels: Tensor) -> Checked:
    """Compare what the module makes of images with what was trained makes of cached features of the same rows.

    A cache with the grid `uniform` of `step` standard deviations holds features with a root mean square error of
    step / sqrt(12); the extraction's precision adds its own. The base on images must agree with the cache within twice
    that, the student within four times, relative to the root mean square of the cached path: another base, other
    weights or another preprocessing are off by tens of per cent.

    Raises:
        MismatchError: naming output, figure and limit.
    """
    batch = Upload(corpus, torch.device("cpu"))(corpus.fetch(rows))
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
    _require(checked.base, checked.base_limit, f"base {spec.name!r}")
    _require(checked.student, checked.student_limit, "student")
    return checked


def _rows(trained: Trained) -> tuple[Corpus, Rows]:
    """The run's first cache that has the base, and some of its valid rows, validation rows first."""
    config = trained.config
    base = config.base
    corpus = Corpus(config.caches[:1], {base: wanted_outputs(trained)[base]}, base)
    corpus.sources = {base: trained.sources[base]}
    held_back = corpus.validation(config.validation)
    order = np.concatenate([np.flatnonzero(held_back), np.flatnonzero(~held_back)])
    cache, chosen = corpus.caches[0], np.empty(0, np.int64)
    for start in range(0, len(order), _LOOKED_AT):
        rows = order[start : start + _LOOKED_AT]
        chosen = np.concatenate([chosen, rows[cache.valid(rows, base)]])[:CHECKED_ROWS]
        if len(chosen) == CHECKED_ROWS:
            break
    if not len(chosen):
        raise ConfigError(f"cache {cache.path}: expected a row that is not masked, found none")
    return corpus, chosen


def _pixels(corpus: Corpus, rows: Rows, module: ExportedStudent, root: str | None) -> Tensor:
    pixels, _ = ImageReader(corpus.caches[0], module.description.input, root=root, threads=1).load(rows)
    return torch.from_numpy(pixels)


def _require(found: dict[str, float], limit: float, who: str) -> None:
    for output, figure in found.items():
        if not figure <= limit:  # also where it is not a number
            raise MismatchError(
                f"{who}: {output}: expected features from images within {limit:.3g} of those from the cache (relative "
                f"root mean square error), found {figure:.3g}; give the images, and the base, that the cache was "
                "extracted from; nothing was written"
            )


def _publish(out: Path, files: dict[str, bytes], module: ExportedStudent, pixels: Tensor) -> None:
    """Write beside, load that as a user would, compare, rename."""
    beside = out.with_name(f".{out.name}.unchecked")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        publish_folder(beside, files)
        with torch.no_grad():
            loaded, own = load_student(beside)(pixels), module(pixels)
        for output in module.description.outputs:
            _require({output: relative_rmse(loaded[output], own[output])}, SAME, "the student as loaded again")
        beside.rename(out)
    except OSError as error:
        raise write_error(error, out) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
