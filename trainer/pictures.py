"""Images beside the cached targets, for students that look at them."""

from dataclasses import replace
from typing import Final

import numpy as np
import torch

from trainer.config import TrainConfig
from trainer.corpus import Corpus, HostBatch
from trainer.data import Fetch
from trainer.images import ImageReader
from trainer.resident import Rows
from trainer.students import Student

_THREADS: Final = 1  # each loader thread decodes its own batch


def with_images(corpus: Corpus, student: Student, config: TrainConfig) -> Fetch:
    """A `fetch` that adds uint8 pixels [B, H, W, 3] as `student.input` wants them; masked rows are black.

    Raises:
        ConfigError: a source is not where its cache, or `images.root`, says.
    """
    assert student.input is not None
    height, width = student.input.size
    readers = [ImageReader(cache, student.input, root=config.images.root, threads=_THREADS) for cache in corpus.caches]

    def fetch(rows: Rows, epochs: Rows) -> HostBatch:
        batch = corpus.fetch(rows, epochs)
        pixels = np.zeros((len(rows), height, width, 3), np.uint8)
        for number, places in batch.parts:
            pixels[places], _ = readers[number].load(rows[places] - corpus.starts[number])
        return replace(batch, images=torch.from_numpy(pixels))

    return fetch
