"""`kpu-train export`, from top to bottom: rebuild the base, join it to the student, compare, write.

What is exported runs on images; what was trained ran on the cache. The two are compared on cached rows before anything
is published: see `trainer.export.checked`.

Letters: B rows.
"""

import os
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kpu.errors import ConfigError
from kpu.trust.code import sha256
from kpu.trust.list import Trust, remember
from kpu.util.digests import digest
from trainer.data.corpus import Corpus
from trainer.data.images import ImageReader
from trainer.data.resident import RowNumbers
from trainer.evaluation.measured import wanted_outputs
from trainer.evaluation.trained import Trained, load_trained
from trainer.export.assemble import assemble
from trainer.export.card import write_card
from trainer.export.checked import Checked, check_paths, require_near
from trainer.export.description import BASE_CODE, CONFIG, STUDENT, STUDENT_CODE, dump_description
from trainer.export.exported import ExportedStudent
from trainer.export.load import load_exported
from trainer.export.program import PROGRAM, SAME, make_program, relative_rmse
from trainer.run.checkpoint import pack_tensors
from trainer.run.place import require_nothing
from trainer.util.files import publish_folder, remove_folder, write_error

CARD: Final = "README.md"
CHECKED_ROWS: Final = 32
_LOOKED_AT: Final = 1024


@dataclass(frozen=True)
class Export:
    """What was written: sizes in bytes by file, and what the check found. `notes` says what was left out, and why."""

    path: Path
    files: dict[str, int]
    checked: Checked
    notes: list[str] = field(default_factory=list)


def export(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bundle: bool | None = None,
    images: str | None = None,
    program: bool = True,
    trust: Trust | None = None,
) -> Export:
    """Write the student of a run as its user runs it, on images, to the folder `out`.

    Python files that go along join the user's list of trusted code, so that one's own export loads as it is.

    Args:
        run: the folder of a run that ended.
        out: a folder that does not exist yet.
        bundle: whether the base's weights go along; None: where they are under 2 GB. A base that is not bundled is
            named by model, weights and digest.
        images: replaces the root that the caches remember.
        program: whether a torch.export program is written, too.
        trust: which code may run of what the run names; by default what the user's list has.

    Raises:
        ConfigError: there is no finished run, something exists at `out`, or the base cannot be built here.
        CorruptError: a file of the run is damaged.
        MismatchError: the image path gives other features than the cached path, or the base is not the cache's.
        SourceError: the images cannot be read.
        TrustError: the code of the student, or of the base, may not run.
    """
    run, out = Path(run), Path(out)
    require_nothing(out)
    trained = load_trained(run, trust)
    module, files = assemble(trained, bundle=bundle)
    corpus, rows = _rows(trained)
    module.description = module.description.model_copy(update={"decoding": corpus.caches[0].plan.source.decoding})
    pixels = _pixels(corpus, rows, module, images or trained.images_root)
    checked = check_paths(trained, module, corpus, rows, pixels)
    files[STUDENT] = pack_tensors(module.own_state())
    notes = list(trained.notes)
    if program:
        try:
            files[PROGRAM] = make_program(module, pixels)
        except Exception as error:  # anyone's model may hold what torch cannot trace
            notes.append(f"no {PROGRAM}: torch.export refused ({type(error).__name__}: {str(error)[:200]})")
    description = module.description.model_copy(
        update={"digests": {name: digest(data) for name, data in files.items()}}
    )
    code = {sha256(files[name]): name for name in (BASE_CODE, STUDENT_CODE) if name in files}
    files[CONFIG] = dump_description(description)
    files[CARD] = write_card(trained, description, checked, notes, code).encode()
    _publish(out, files, module, pixels, replace(trained.codes.trust, listed=trained.codes.trust.listed | code.keys()))
    unkept = remember({key: str((out / name).absolute()) for key, name in code.items()})
    notes += [unkept] if unkept is not None else []
    return Export(out, {name: len(data) for name, data in files.items()}, checked, notes)


def _rows(trained: Trained) -> tuple[Corpus, RowNumbers]:
    """The run's first cache that has the base, and some of its valid rows, validation rows first."""
    config = trained.config
    base = config.base
    corpus = Corpus(trained.caches[:1], {base: wanted_outputs(trained)[base]}, base)
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


def _pixels(corpus: Corpus, rows: RowNumbers, module: ExportedStudent, root: str | None) -> Tensor:
    reader = ImageReader(corpus.caches[0], module.description.input, root=root, threads=1, option="--images")
    pixels, _ = reader.load(rows)
    return torch.from_numpy(pixels)


def _publish(out: Path, files: dict[str, bytes], module: ExportedStudent, pixels: Tensor, trust: Trust) -> None:
    """Write beside, load that as a user would, compare, rename."""
    beside = out.with_name(f".{out.name}.unchecked-{secrets.token_hex(6)}")
    try:
        publish_folder(beside, files)
        with torch.no_grad():
            loaded, own = load_exported(beside, trust)(pixels), module(pixels)
        for output in module.description.outputs:
            require_near({output: relative_rmse(loaded[output], own[output])}, SAME, "the student as loaded again")
        beside.rename(out)
    except OSError as error:
        raise write_error(error, out) from error
    finally:
        remove_folder(out.parent, beside.name)
