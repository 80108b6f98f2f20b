"""Which rows are measured, and which a probe may learn from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kpu.errors import ConfigError, KpuError
from kpu.records.units import Mask
from trainer.data.corpus import Corpus
from trainer.data.resident import RowNumbers
from trainer.data.split import some_of, validation_mask
from trainer.evaluation.measured import open_measured
from trainer.evaluation.trained import Trained

FITTED_ROWS: Final = 2**16
"""Probes and linear maps are fitted on as many training rows, at most; probes are measured on as many, at most."""
CHOSEN_ROWS: Final = 2**14
"""The penalty of a probe is chosen on as many rows, at most."""
_ROWS_AT_ONCE: Final = 2**22
_CHOSEN_SHARE: Final = 0.1  # of the samples, where the validation rows are what is measured


@dataclass(frozen=True)
class ProbeSplit:
    """Rows to fit on, and those to choose a penalty on."""

    corpus: Corpus
    fitted: RowNumbers
    chosen: RowNumbers


def open_training(trained: Trained, corpus: Corpus, notes: list[str]) -> Corpus | None:
    """The training caches; None if one is gone. `corpus` is taken for them where it is, also where they moved."""
    try:
        return corpus if trained.run.has_caches(corpus) else open_measured(trained, trained.caches, [])
    except KpuError as error:
        notes.append(f"no probe, k-NN nor frozen_base maps: the training caches cannot be read ({error})")
        return None


def rows_to_measure(
    trained: Trained, corpus: Corpus, training: Corpus | None, given: bool, notes: list[str]
) -> tuple[RowNumbers, bool]:
    """Rows to measure on, and whether some are the training caches' validation rows.

    Never one whose image the student learned from, whatever the cache is called that it is in now; what is left out of
    caches that were `given` is added to `notes`. Where the training caches are gone, their names and those of their
    images must do.
    """
    if not given:
        learned, held_back = _by_key(trained, corpus, [True] * len(corpus.caches))
    elif training is None:
        learned, held_back = _by_key(trained, corpus, [trained.run.learned_from(cache) for cache in corpus.caches])
    else:
        learned, held_back = _by_image(trained, corpus, training)
    if given and learned.any():
        notes.append(f"{np.count_nonzero(learned)} rows are left out: the student learned from their images")
    rows = np.flatnonzero(~learned)
    if not len(rows):
        raise ConfigError(
            f"caches: expected rows that the student did not learn from, found none (validation: "
            f"{trained.config.validation:g}); give another cache with --cache"
        )
    return rows, bool(held_back.any())


def _by_key(trained: Trained, corpus: Corpus, known: Sequence[bool]) -> tuple[Mask, Mask]:
    """Which rows, of the caches that are `known`, the run learned from, and which it held back, bool [rows]."""
    inside = np.repeat(known, np.diff(corpus.starts))
    held_back = corpus.validation(trained.config.validation)
    return inside & ~held_back, inside & held_back


def _by_image(trained: Trained, corpus: Corpus, training: Corpus) -> tuple[Mask, Mask]:
    """Of which rows the run learned from the image, and of which it only held the image back, bool [rows]."""
    images = np.concatenate(list(_images_of(corpus)))
    learned, held_back = np.zeros(len(images), dtype=bool), np.zeros(len(images), dtype=bool)
    own, start = training.validation(trained.config.validation), 0
    for theirs in _images_of(training):
        kept = own[start : start + len(theirs)]
        learned |= np.isin(images, theirs[~kept])
        held_back |= np.isin(images, theirs[kept])
        start += len(theirs)
    return learned, held_back & ~learned


def _images_of(corpus: Corpus) -> Iterator[npt.NDArray[np.uint64]]:
    """The first half of the digest of every row's encoded image, in order, some millions at a time."""
    for cache in corpus.caches:
        for start in range(0, cache.rows, _ROWS_AT_ONCE):
            digests = cache.image_digests(slice(start, start + _ROWS_AT_ONCE))
            yield np.ascontiguousarray(digests[:, :8]).view(np.uint64).ravel()


def split_training(trained: Trained, corpus: Corpus, unseen: bool) -> ProbeSplit:
    """Training rows to fit on and rows to choose on; never those that are measured."""
    fraction = trained.config.validation
    held_back = corpus.validation(fraction)
    choose = held_back
    if unseen or not held_back.any():
        keys = (table for cache in corpus.caches for table in cache.samples.iter_batches(["key"]))
        more = min(fraction + _CHOSEN_SHARE, (1 + fraction) / 2)
        choose = np.concatenate([validation_mask(t["key"].combine_chunks(), more) for t in keys]) & ~held_back
    seed = trained.config.seed
    return ProbeSplit(
        corpus,
        some_of(np.flatnonzero(~held_back & ~choose), FITTED_ROWS, seed),
        some_of(np.flatnonzero(choose), CHOSEN_ROWS, seed),
    )
