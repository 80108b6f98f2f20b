"""The batches of a run: which rows its caches have, in what order they come, and what reads them ahead."""

from collections.abc import Callable, Iterator
from itertools import islice

from kpu.errors import ConfigError
from trainer.config import TrainConfig
from trainer.data.corpus import Corpus
from trainer.data.loading import Batch, BatchLoader, DeviceTransfer, Drawn, Fetch, Stream, loader_threads
from trainer.data.order import make_order
from trainer.data.resident import free_memory
from trainer.data.targets import choose_outputs
from trainer.loop.world import World
from trainer.model import Inheritance

Live = Callable[[Corpus, TrainConfig, Fetch], Fetch]
"""Turns reading from the cache into running the teachers: only `cli` has one to give."""


def open_corpus(config: TrainConfig, world: World) -> Corpus:
    """The caches of a run, checked."""
    memory = free_memory(world.local_size) if config.loader.memory == "auto" else config.loader.memory
    return Corpus(config.caches, choose_outputs(config), config.base, memory=memory, pinned=world.device.type == "cuda")


def open_stream(config: TrainConfig, corpus: Corpus) -> Stream:
    """The training rows of the caches, in the order that the configuration names."""
    order = make_order(config.order, corpus.units(), corpus.digest, config.seed)
    return Stream(order, corpus.validation(config.validation))


def draw_batches(stream: Stream, size: int, position: int = 0, share: slice = slice(None)) -> Iterator[Drawn]:
    """This process's share of every batch of `size` rows from `position` on, without end."""
    while True:
        drawn = stream.draw(position, size)
        position = drawn.position
        yield Drawn(drawn.rows[share], drawn.epochs[share], position)


def first_epoch(
    config: TrainConfig, stream: Stream, loader: BatchLoader, upload: DeviceTransfer, *, images: bool = False
) -> Iterator[Batch]:
    """The training rows in their first order, the same in every process, as many at a time as it has in a step.

    `images` as for `BatchLoader.load`.
    """
    size = config.rows_per_worker
    drawn = islice(draw_batches(stream, size), -(-stream.rows // size))
    for _, host in loader.load(drawn, images=images):
        yield upload(host)


def open_loader(config: TrainConfig, corpus: Corpus, model: Inheritance, live: Live | None) -> BatchLoader:
    """The threads that read ahead what the model needs.

    Raises:
        ConfigError: live targets are asked for where there is nothing to make them with.
    """
    targets: Fetch = corpus.fetch
    if config.targets.source == "live":
        if live is None:
            raise ConfigError("targets.source: expected cache, found live; only `kpu-train fit` can run teachers")
        targets = live(corpus, config, targets)
    fetch = targets
    if model.student.needs_images:
        from trainer.loop.pictures import with_images  # decoding is loaded only where it is needed

        fetch = with_images(targets, corpus, model.student, config)
    threads = config.loader.threads
    if threads == "auto":
        threads = loader_threads(next(model.parameters()).device, images=model.student.needs_images)
    return BatchLoader(fetch, threads, config.loader.ahead, targets=targets)
