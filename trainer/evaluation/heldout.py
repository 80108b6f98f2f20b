"""Which rows are measured, and which a probe may learn from."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from cache.errors import ConfigError, KpuError
from trainer.corpus import Corpus
from trainer.evaluation.measured import open_measured
from trainer.evaluation.trained import Trained
from trainer.resident import Rows
from trainer.split import validation_mask

FITTED_ROWS: Final = 2**16
"""Probes and linear maps are fitted on as many training rows, at most; probes are measured on as many, at most."""
CHOSEN_ROWS: Final = 2**14
"""The penalty of a probe is chosen on as many rows, at most."""
_CHOSEN_SHARE: Final = 0.1  # of the samples, where the validation rows are what is measured


@dataclass(frozen=True)
class Training:
    """Rows to fit on, and those to choose a penalty on."""

    corpus: Corpus
    fitted: Rows
    chosen: Rows


def open_training(trained: Trained, corpus: Corpus, notes: list[str]) -> Corpus | None:
    """The training caches; None where one is gone. `corpus` is taken for them where it is, also where they moved."""
    try:
        return corpus if trained.run.has_caches(corpus) else open_measured(trained, trained.config.caches, [])
    except KpuError as error:
        notes.append(f"no probe, k-NN nor frozen_base maps: the training caches cannot be read ({error})")
        return None


def rows_to_measure(trained: Trained, corpus: Corpus, given: bool) -> tuple[Rows, bool]:
    """Rows to measure on, and whether they are the training caches' validation rows.

    Of a cache that the run learned from only the validation rows are new to the student, wherever the cache is now.
    """
    known = [not given or trained.run.learned_from(cache) for cache in corpus.caches]
    held_back = corpus.validation(trained.config.validation)
    wanted = np.ones(corpus.rows, dtype=bool)
    for number, start in enumerate(corpus.starts[:-1]):
        if known[number]:
            wanted[start : corpus.starts[number + 1]] = held_back[start : corpus.starts[number + 1]]
    rows = np.flatnonzero(wanted)
    if not len(rows):
        raise ConfigError(
            f"caches: expected rows that the student did not learn from, found none (validation: "
            f"{trained.config.validation:g}); give another cache with --cache"
        )
    return rows, any(known)


def split_training(trained: Trained, corpus: Corpus, unseen: bool) -> Training:
    """Training rows to fit on and rows to choose on; never those that are measured."""
    fraction = trained.config.validation
    held_back = corpus.validation(fraction)
    choose = held_back
    if unseen or not held_back.any():
        keys = (table for cache in corpus.caches for table in cache.samples.iter_batches(["key"]))
        more = min(fraction + _CHOSEN_SHARE, (1 + fraction) / 2)
        choose = np.concatenate([validation_mask(t["key"].combine_chunks(), more) for t in keys]) & ~held_back
    seed = trained.config.seed
    return Training(
        corpus,
        some_of(np.flatnonzero(~held_back & ~choose), FITTED_ROWS, seed),
        some_of(np.flatnonzero(choose), CHOSEN_ROWS, seed),
    )


def some_of(rows: Rows, most: int, seed: int) -> Rows:
    """At most so many of the rows, drawn with a seed, in order."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
