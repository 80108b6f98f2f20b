"""`kpu-train eval`, from top to bottom: what a finished run knows, measured on any cache, beside two controls."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from kpu.errors import StorageError
from kpu.trust.list import Trust
from trainer.data.corpus import Corpus
from trainer.data.loading import Batch, BatchLoader, DeviceTransfer, Fetch
from trainer.data.resident import RowNumbers
from trainer.data.split import some_of
from trainer.evaluation.controls import LinearMaps
from trainer.evaluation.heldout import FITTED_ROWS, open_training, rows_to_measure, split_training
from trainer.evaluation.labels import Labels
from trainer.evaluation.measured import open_measured
from trainer.evaluation.measures import NO_LABEL, OwnHead, TeacherMeasures, mean_of
from trainer.evaluation.probing import Vectors, add_vectors, probe_all
from trainer.evaluation.trained import Trained, load_trained
from trainer.loop.scores import batches_of
from trainer.run.repeated import require_distinct, shared_images
from trainer.util.allocator import keep_freed_memory
from trainer.util.files import replace_file
from trainer.util.sealed import dump_json

_THREADS: Final = 2
_AHEAD: Final = 4

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Subject:
    """Someone to measure: the student, or the frozen base with linear maps. None: nobody predicts that teacher."""

    features: Callable[[Batch], dict[str, Tensor]]
    predict: Callable[[dict[str, Tensor], str], dict[str, Tensor] | None]


def evaluate(
    path: str | os.PathLike[str],
    caches: Sequence[str] = (),
    *,
    controls: bool = True,
    images: str | None = None,
    progress: Progress | None = None,
    trust: Trust | None = None,
    phase: Callable[[str], None] = lambda _: None,
    same_labels: bool = False,
) -> dict[str, Any]:
    """Measure a finished run on caches, by default on the validation rows of its own; the result is kept with the run.

    Args:
        path: the folder of the run.
        caches: where to measure; the base must be there, and other teachers may be.
        controls: whether to measure the frozen base and each teacher alone, too, which takes most of the time.
        images: replaces the root that the caches remember, for students that need images.
        same_labels: whether equal labels mean the same in all caches, whatever they call their classes.
        progress: is notified of rows, (done, total).
        trust: which code may run of what the run names; by default what the user's list has.
        phase: is told what begins.

    Returns:
        `{"teachers": {name: {agreement, kappa, majority, accuracy, r2_<output>}}, "base": {r2, r2_<output>, agreement,
        kappa, majority}, "linear_probe", "knn", "effective_rank", "frozen_base": {the same}, "teacher_alone": {name:
        {accuracy, linear_probe, knn, effective_rank}}, "run", "caches", "rows", "fitted_rows", "notes"}`; None for what
        cannot be measured, of which `notes` says why. Where it could not be kept, `unkept` says why.

    Raises:
        ConfigError: there is no finished run, or a cache is given twice or lacks what is needed, or no row is there to
            measure on.
        TrustError: the student's code may not run.
        CorruptError: a file of the run is damaged.
        MismatchError: a cache was made with another base or other teachers.
    """
    path = Path(path)
    trained = load_trained(path, trust)
    notes = list(trained.notes)
    device = torch.device("cuda" if torch.cuda.is_available() and trained.config.device != "cpu" else "cpu")
    trained.model.to(device)
    if device.type == "cpu":
        keep_freed_memory()
    corpus = open_measured(trained, list(caches) or trained.caches, notes)
    if caches:
        require_distinct(corpus.caches)
    notes.extend(shared_images(corpus.caches))
    training = open_training(trained, corpus, notes)
    rows, unseen = rows_to_measure(trained, corpus, training, bool(caches), notes)
    shapes = {name: {o: source.shapes[o] for o in trained.config.outputs} for name, source in corpus.sources.items()}
    reading, labels = _Reading(trained, device, images, progress), Labels(corpus, training, notes, same=same_labels)
    split = None if training is None else split_training(trained, training, unseen)
    to_fit = np.empty(0, np.int64) if split is None else split.fitted
    maps = LinearMaps(trained.config.base, shapes, to_fit, trained.config.seed) if controls else None
    fitted, chosen = Vectors(device), Vectors(device)
    phase(f"read: {len(to_fit):,} rows to fit probes on, {len(rows):,} rows to measure")
    with torch.no_grad():
        if split is not None:
            fitted = _gather(reading, split.corpus, split.fitted, labels, maps)
            chosen = _gather(reading, split.corpus, split.chosen, labels)
            if maps is not None:
                maps.solve()
        found, tested = _measure(reading, corpus, rows, labels, maps)
    names = tuple(corpus.sources) if controls else ()
    why_not = "the training caches cannot be read" if training is None else labels.why_not
    phase("probe: linear probes and k-NN")
    student, alone = probe_all(names, why_not, fitted, chosen, tested, notes)
    found |= student
    if controls:
        found["frozen_base"] |= alone[trained.config.base]
    for name, probed in alone.items():
        found["teacher_alone"][name] |= probed
    found |= {
        "run": str(path),
        "caches": [cache.path for cache in corpus.caches],
        "rows": len(rows),
        "fitted_rows": len(to_fit),
        "notes": notes,
    }
    _keep(path, evaluation_file(corpus.digest if caches else None), found)
    return found


def evaluation_file(digest: str | None) -> str:
    """The name, in a run's folder, of what was measured on caches with this `Corpus.digest`; None: on its own."""
    return "eval.json" if digest is None else f"eval-{digest[:12]}.json"


@dataclass(frozen=True)
class _Reading:
    """How batches come: on which device, with which images, and who is notified of it."""

    trained: Trained
    device: torch.device
    images: str | None
    progress: Progress | None

    def batches(self, corpus: Corpus, rows: RowNumbers) -> Iterator[Batch]:
        """Rows of a corpus in order."""
        student, config = self.trained.model.student, self.trained.config
        fetch: Fetch = corpus.fetch
        if student.needs_images:
            from trainer.loop.pictures import with_images  # decoding is loaded only where it is needed

            root = self.trained.images_root if self.images is None else self.images
            place = config.images.model_copy(update={"root": root})
            fetch = with_images(fetch, corpus, student, config.model_copy(update={"images": place}), "--images")
        upload, done = DeviceTransfer(corpus, self.device, student.input), 0
        with BatchLoader(fetch, _THREADS, _AHEAD) as loader:
            for batch in batches_of(rows, config.rows_per_worker, loader, upload):
                yield batch
                done += len(batch)
                if self.progress is not None:
                    self.progress(done, len(rows))


def _gather(
    reading: _Reading, corpus: Corpus, rows: RowNumbers, labels: Labels, maps: LinearMaps | None = None
) -> Vectors:
    """Collect what probes and, with `maps`, linear maps are fitted on."""
    model, into = reading.trained.model, Vectors(reading.device)
    fitted = np.full(corpus.rows, NO_LABEL, np.int64) if labels.fitted is None else labels.fitted
    for batch in reading.batches(corpus, rows):
        if maps is not None:
            maps.update(batch)
        truth = torch.from_numpy(fitted[batch.rows])
        add_vectors(into, model.base, batch, model.encode(batch), truth, torch.ones(len(batch), dtype=torch.bool))
    return into


def _measure(
    reading: _Reading, corpus: Corpus, rows: RowNumbers, labels: Labels, maps: LinearMaps | None
) -> tuple[dict[str, Any], Vectors]:
    """The student and, with `maps`, the frozen base over the rows, which are read once."""
    config, model, device = reading.trained.config, reading.trained.model, reading.device
    base, outputs = config.base, config.outputs
    subjects = {"student": _Subject(model.encode, model.predict)}
    if maps is not None:
        subjects["frozen_base"] = _Subject(
            lambda batch: {o: batch.targets[base][o] for o in outputs},
            lambda features, name: maps.predict(features, name) if name in maps else None,
        )
    heads = {
        n: OwnHead(s, device) if s.head is not None and "global" in outputs else None for n, s in corpus.sources.items()
    }
    meanings = {name: labels.of_head(name) for name in corpus.sources}
    teachers = {s: {n: TeacherMeasures(outputs, heads[n], meanings[n]) for n in corpus.sources} for s in subjects}
    kept = {subject: TeacherMeasures(outputs, heads[base], None) for subject in subjects}
    tested = Vectors(device)
    probed = np.isin(np.arange(corpus.rows), some_of(rows, FITTED_ROWS, config.seed))
    for batch in reading.batches(corpus, rows):
        truth, have_base = labels.truth[batch.rows], batch.weights[base] > 0
        for key, subject in subjects.items():
            features = subject.features(batch)
            own = {o: features[o][..., : batch.targets[base][o].shape[-1]] for o in outputs}
            kept[key].update(own, batch.targets[base], have_base, truth)
            for name in corpus.sources:
                predicted = subject.predict(features, name)
                if predicted is not None:
                    valid = have_base & (batch.weights[name] > 0)
                    teachers[key][name].update(predicted, batch.targets[name], valid, truth)
            if key == "student":
                mask = torch.from_numpy(probed[batch.rows])
                add_vectors(tested, base, batch, features, torch.from_numpy(labels.probed[batch.rows]), mask)
    found = {
        key: {
            "teachers": {name: measured.as_json() for name, measured in teachers[key].items()},
            "base": _base_json(kept[key]),
        }
        for key in subjects
    }
    alone = {n: {"accuracy": teachers["student"][n].head.own_accuracy()} for n in corpus.sources}
    if maps is None:
        return found["student"], tested
    return {**found["student"], "frozen_base": found["frozen_base"], "teacher_alone": alone}, tested


def _base_json(measured: TeacherMeasures) -> dict[str, float | None]:
    r2, said = measured.r2(), measured.head.as_json()
    return {"r2": mean_of(r2), **r2, **{key: said[key] for key in ("agreement", "kappa", "majority")}}


def _keep(path: Path, name: str, found: dict[str, Any]) -> None:
    try:
        replace_file(path / name, dump_json(found))
    except StorageError as error:  # what was measured is worth more than the copy
        found["unkept"] = str(error)
