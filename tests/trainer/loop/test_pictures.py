"""Images beside the rows that something else reads."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.conftest import BROKEN, Configure
from trainer.data.corpus import Corpus, HostBatch
from trainer.data.images import ImageReader
from trainer.data.resident import RowNumbers
from trainer.data.targets import choose_outputs
from trainer.loop.pictures import with_images
from trainer.model import Inheritance

ROWS = np.array([3, BROKEN, 60])


def pictured(configure: Configure, place: Path, *, pinned: bool) -> tuple[HostBatch, list[RowNumbers], Corpus]:
    """Some rows with images, and what was asked of the fetch below."""
    model = f"torch:{place}/toy.py:toy"
    config = configure(student={"kind": "full", "model": model, "weights": "random"})
    corpus = Corpus(config.caches, choose_outputs(config), config.base, pinned=pinned)
    asked: list[RowNumbers] = []

    def fetch(rows: RowNumbers, epochs: RowNumbers) -> HostBatch:
        asked.append(rows)
        return corpus.fetch(rows, epochs)

    student = Inheritance(config, corpus.sources).student
    return with_images(fetch, corpus, student, config)(ROWS, np.zeros_like(ROWS)), asked, corpus


def test_images_are_added_to_what_another_reads(configure: Configure, place: Path) -> None:
    batch, asked, corpus = pictured(configure, place, pinned=False)
    assert [rows.tolist() for rows in asked] == [ROWS.tolist()]
    (cache,) = corpus.caches
    spec = corpus.sources["general"].spec.known_input
    assert batch.images is not None
    assert torch.equal(batch.images, torch.from_numpy(ImageReader(cache, spec, root=None, threads=1).load(ROWS)[0]))
    assert batch.images[0].any() and not batch.images[1].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
def test_images_for_a_gpu_are_read_into_pinned_memory(configure: Configure, place: Path) -> None:
    batch, _, _ = pictured(configure, place, pinned=True)
    assert batch.images is not None and batch.images.is_pinned()
