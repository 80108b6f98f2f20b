"""Images beside the cached targets, for students that look at them."""

from dataclasses import replace
from typing import Final

import torch

from trainer.config import TrainConfig
from trainer.data.corpus import Corpus, HostBatch
from trainer.data.images import ImageReader
from trainer.data.loading import Fetch
from trainer.data.resident import RowNumbers
from trainer.students import Student

_THREADS: Final = 1  # each loader thread decodes its own batch


def with_images(
    fetch: Fetch, corpus: Corpus, student: Student, config: TrainConfig, option: str = "images.root"
) -> Fetch:
    """`fetch` with uint8 pixels [B, H, W, 3] added, as `student.input` wants them; masked rows are black.

    Raises:
        ConfigError: a source is not where its cache, or `images.root`, which a user sets by `option`, says.
    """
    assert student.input is not None
    height, width = student.input.size
    readers = [
        ImageReader(cache, student.input, root=config.images.root, threads=_THREADS, option=option)
        for cache in corpus.caches
    ]

    def fetch_both(rows: RowNumbers, epochs: RowNumbers) -> HostBatch:
        batch = fetch(rows, epochs)
        images = torch.empty((len(rows), height, width, 3), dtype=torch.uint8, pin_memory=corpus.pinned)
        pixels = images.numpy()
        for number, places in batch.parts:
            pixels[places], _ = readers[number].load(rows[places] - corpus.starts[number])
        return replace(batch, images=images)

    return fetch_both
