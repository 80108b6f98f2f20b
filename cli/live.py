"""Targets that teachers emit while the student trains, instead of cached ones: for comparisons, and for their cost.

The one place where teachers enter a training: `cli` alone may know both `pipeline` and `trainer`.
"""

from collections.abc import Mapping
from dataclasses import replace
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from kpu.commit.teacher import check_same
from kpu.pixels.resize import Geometry, geometry
from kpu.reading.cache import Cache
from kpu.trust.list import Trust
from pipeline.teachers import load_shipped
from pipeline.teachers.base import FrozenTeacher
from pipeline.verify_deep import ship_again
from trainer.config import TrainConfig
from trainer.data.corpus import Corpus, HostBatch
from trainer.data.images import ImageReader
from trainer.data.loading import Fetch
from trainer.data.resident import RowNumbers


def run_teachers(corpus: Corpus, config: TrainConfig, fetch: Fetch, trust: Trust | None = None) -> Fetch:
    """A `fetch` that runs the teachers of `corpus` on the images of the rows, with the views that were extracted.

    Which rows are masked is the caches' word. What it stores is raw, float32 on the teachers' device. Of the code that
    the caches name, `trust` says which may run; by default what the user's list has.

    Raises:
        ConfigError: the images are not where a cache, or `images.root`, says.
        TeacherError: a teacher does not load.
        TrustError: a teacher's code may not run.
        MismatchError: a teacher is not the one that was extracted.
    """
    cuda = torch.cuda.is_available() and config.device != "cpu"
    device = f"cuda:{torch.cuda.current_device()}" if cuda else "cpu"
    parts = [_Live(corpus, number, config, device, trust) for number in range(len(corpus.caches))]
    threads = torch.get_num_threads()  # a new thread would take its own number, and the first GPU

    def run(rows: RowNumbers, epochs: RowNumbers) -> HostBatch:
        torch.set_num_threads(threads)
        if cuda:
            torch.cuda.set_device(device)
        batch = fetch(rows, epochs)
        stored: dict[tuple[int, str, str], Tensor] = {}
        for number, places in batch.parts:
            found = parts[number].features(rows[places] - corpus.starts[number], batch.weights, places)
            stored |= {(number, *key): values for key, values in found.items()}
        return replace(batch, stored=stored)

    return run


class _Live:
    """The teachers of one cache, and its images. One batch at a time is computed."""

    def __init__(self, corpus: Corpus, number: int, config: TrainConfig, device: str, trust: Trust | None) -> None:
        self._cache: Cache = corpus.caches[number]
        self._wanted = {name: corpus.wanted[name] for name in corpus.teachers_of(self._cache)}
        self._teachers = {name: _load(self._cache, name, device, trust) for name in self._wanted}
        self._readers: dict[Geometry, ImageReader] = {}
        for teacher in self._teachers.values():
            if geometry(teacher.input) not in self._readers:
                reader = ImageReader(self._cache, teacher.input, root=config.images.root, threads=1)
                self._readers[geometry(teacher.input)] = reader
        self._lock = Lock()

    def features(
        self, rows: RowNumbers, weights: Mapping[str, Tensor], places: RowNumbers
    ) -> dict[tuple[str, str], Tensor]:
        """Raw features of rows of the cache by teacher and output, 0 if `weights` at `places` are."""
        pixels = {size: torch.from_numpy(reader.load(rows)[0]) for size, reader in self._readers.items()}
        found = {}
        with self._lock:
            for name, teacher in self._teachers.items():
                features = teacher(pixels[geometry(teacher.input)])
                masked = np.flatnonzero(weights[name][torch.from_numpy(places)].numpy() == 0)
                for output in self._wanted[name]:
                    values = features[output].clone()  # what inference mode made may not take part in training
                    found[name, output] = values.index_fill_(0, torch.from_numpy(masked).to(values.device), 0)
        return found


def _load(cache: Cache, name: str, device: str, trust: Trust | None) -> FrozenTeacher:
    spec = cache.teachers[name].spec
    teacher = load_shipped(name, ship_again(spec, trust), device=device, seed=cache.plan.seed)
    check_same(spec, teacher.spec(spec.codec, spec.format))
    return teacher
