"""What labels mean: numbers of different caches are compared by the names of their classes, or not at all."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from kpu.reading.cache import Cache
from trainer.data.corpus import Corpus
from trainer.data.resident import RowNumbers
from trainer.evaluation.measures import NO_LABEL

Names = tuple[str, ...]
_SHOWN: Final = 200
_BY_NAME: Final = "extract with `labels` that name the classes, such as ['cat', 'dog', null]"


class Numbering:
    """One number for each class of several caches, in the order in which their plans first name it.

    Labels of caches that name no classes, or all the same ones, are their own numbers. `why_not` says why labels of
    these caches cannot be compared, None if they can. With `same` all labels are numbers that mean the same.
    """

    def __init__(self, caches: Sequence[Cache], *, same: bool = False) -> None:
        named = {cache.path: cache.plan.classes for cache in caches if cache.plan.classes is not None}
        self.plain = same or len(set(named.values())) < 2
        union = dict.fromkeys(name for names in named.values() for name in names)
        self.names: Names = next(iter(named.values()), ()) if self.plain else tuple(union)
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self.why_not = None if same else self._why_not(caches, named)

    def _why_not(self, caches: Sequence[Cache], named: dict[str, Names]) -> str | None:
        if not self.plain:
            for path, names in named.items():
                twice = next((name for name in names if names.count(name) > 1), None)
                if twice is not None:
                    return f"the caches have different classes, and {path} has two that are called {twice!r}"
        nameless = [cache for cache in caches if cache.plan.classes is None and _has_labels(cache)]
        if named and nameless:
            return (
                f"the labels of {nameless[0].path} are numbers without names, those of {next(iter(named))} are of "
                "classes with names: nothing says that they mean the same (--same-labels says so)"
            )
        return None

    def labels(self, cache: Cache, labels: RowNumbers) -> RowNumbers:
        """Labels of a cache in this numbering, int64 [n]; those below 0 are NO_LABEL."""
        if not self.plain and cache.plan.classes is not None:
            table = np.array([self._numbers[name] for name in cache.plan.classes], np.int64)
            known = (labels >= 0) & (labels < len(table))
            return np.where(known, table[np.where(known, labels, 0)], NO_LABEL)
        return np.where(labels < 0, NO_LABEL, labels)

    def numbers(self, cache: Cache, labels: Sequence[int | str]) -> tuple[int, ...]:
        """What a teacher's labels in a cache are in this numbering; names that no plan has get numbers of their own."""
        own = self.labels(cache, np.array([NO_LABEL if isinstance(each, str) else each for each in labels], np.int64))
        return tuple(
            self._numbers.setdefault(each, len(self._numbers)) if isinstance(each, str) else int(number)
            for each, number in zip(labels, own, strict=True)
        )

    def rows(self, corpus: Corpus) -> RowNumbers:
        """The label of every row of a corpus in this numbering, int64 [rows]."""
        labels, starts = corpus.labels(), corpus.starts
        parts = (
            self.labels(cache, labels[start:stop])
            for cache, start, stop in zip(corpus.caches, starts, starts[1:], strict=False)
        )
        return np.concatenate(list(parts))

    def name(self, label: int) -> str:
        """What a message calls a label."""
        if label == NO_LABEL:
            return "none"
        return next((repr(name) for name, number in self._numbers.items() if number == label), str(label))


class Labels:
    """The labels of the rows that are measured and of those that probes learn from, and what heads answer.

    `truth` int64 [rows] are those measured, `probed` the same for probes, `fitted` those of the training caches; all in
    one numbering. `why_not` says why there are no probes. What is withheld, and why, is added to `notes`.
    """

    def __init__(self, corpus: Corpus, training: Corpus | None, notes: list[str], *, same: bool = False) -> None:
        learned = () if training is None else tuple(training.caches)
        numbering = Numbering([*learned, *corpus.caches], same=same)
        self.why_not = numbering.why_not
        if self.why_not is not None:  # each side for itself may still agree with itself
            learned, numbering = (), Numbering(corpus.caches)
            if numbering.why_not is not None:
                notes.append(f"no accuracy: {numbering.why_not}")
        elif not numbering.plain:
            notes.append("the caches number their classes differently: labels are matched by the classes' names")
        self._numbering, self._caches = numbering, (*learned, *corpus.caches)
        measurable = numbering.why_not is None
        self.truth = numbering.rows(corpus) if measurable else np.full(corpus.rows, NO_LABEL, np.int64)
        self.fitted = None if training is None or not learned else numbering.rows(training)
        self.probed = self.truth
        if learned and not numbering.plain:
            self.probed = self._taught(learned, notes)
        self._notes = notes

    def _taught(self, learned: Sequence[Cache], notes: list[str]) -> RowNumbers:
        """The truth without classes that no training cache names: a probe cannot know them."""
        names = {name for cache in learned for name in cache.plan.classes or ()}
        taught = [number for number, name in enumerate(self._numbering.names) if name in names]
        known = np.isin(self.truth, [*taught, NO_LABEL])
        if not known.all():
            other = sorted(set(self._numbering.names) - names)
            notes.append(
                f"{np.count_nonzero(~known)} rows are left out of the probes: the training has none of their classes "
                f"({', '.join(other)})"[:_SHOWN]
            )
        return np.where(known, self.truth, NO_LABEL)

    def of_head(self, teacher: str) -> tuple[int, ...] | None:
        """What the outputs of a teacher's head mean; None if nobody says, or two caches say different things.

        Numbers in a configuration mean other classes where the data has others: only those that all caches agree on
        are believed.
        """
        said: dict[tuple[int, ...], Cache] = {}
        for cache in self._caches:
            labels = cache.teachers[teacher].spec.labels if teacher in cache.teachers else None
            nameless = cache.plan.classes is None and not self._numbering.plain  # it has no labels, either
            if labels is not None and not nameless:
                said.setdefault(self._numbering.numbers(cache, labels), cache)
        if len(said) > 1:
            (first, one), (second, two) = list(said.items())[:2]
            output = next(k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
            names = [self._numbering.name(each[output]) for each in (first, second)]
            self._notes.append(
                f"no accuracy of teacher {teacher!r}: output {output} of its head means class {names[0]} in "
                f"{one.path}, {names[1]} in {two.path}; {_BY_NAME}"
            )
            return None
        return next(iter(said), None)


def _has_labels(cache: Cache) -> bool:
    """Whether some row has one; most caches show it in their first part."""
    return any((table["label"].drop_null().to_numpy() >= 0).any() for table in cache.samples.iter_batches(["label"]))
