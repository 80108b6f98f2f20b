"""Batches in order: which rows come when, read ahead by threads, standardised on the training device.

Letters: B rows of a batch.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kpu.format.teacher import InputSpec
from kpu.util.cores import usable_cores
from trainer.data.corpus import Corpus, HostBatch
from trainer.data.images import normalise
from trainer.data.order import Order
from trainer.data.resident import RowNumbers

Fetch = Callable[[RowNumbers, RowNumbers], HostBatch]


@dataclass(frozen=True)
class Batch:
    """Rows on the training device.

    `targets` holds standardised float32 features [B, C] or [B, T, C] by teacher and output, 0 in masked rows; `weights`
    float32 [B] by teacher; `images` float32 [B, 3, H, W], where the student needs them.
    """

    rows: RowNumbers
    epochs: RowNumbers
    targets: dict[str, dict[str, Tensor]]
    weights: dict[str, Tensor]
    images: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Drawn:
    """The rows of one batch, with the epoch of each; `position` is where the next batch begins."""

    rows: RowNumbers
    epochs: RowNumbers
    position: int


class Stream:
    """Training rows without end, epoch after epoch; a batch may end one epoch and begin the next.

    A position counts places of the order, over all epochs: rows kept for validation take a place, too, and are passed
    over. It means the same under any batch size, number of workers and choice of teachers.
    """

    def __init__(self, order: Order, held_back: npt.NDArray[np.bool_]) -> None:
        self._order, self._kept = order, ~held_back
        self.rows = int(np.count_nonzero(self._kept))
        self.held_back = np.flatnonzero(held_back)

    def draw(self, position: int, size: int) -> Drawn:
        """The next `size` rows from `position` on."""
        chunks, epochs, missing = [], [], size
        while missing:
            epoch, start = divmod(position, self._order.rows)
            places = self._order.take(epoch, start, min(start + missing, self._order.rows))
            rows = places[self._kept[places]]
            chunks.append(rows)
            epochs.append(np.full(len(rows), epoch, np.int64))
            position += len(places)
            missing -= len(rows)
        return Drawn(np.concatenate(chunks), np.concatenate(epochs), position)


def loader_threads(device: torch.device, *, images: bool) -> int:
    """How many read ahead if nobody says so: more where a GPU waits for images, which take longest to decode."""
    return max(2, min(8, usable_cores() // 2)) if images and device.type == "cuda" else 2


class BatchLoader:
    """Reads batches ahead with threads. `waited` is the seconds that `next` has spent waiting for them.

    `targets`, where images take a `fetch` of their own, reads the same rows without them.
    """

    def __init__(self, fetch: Fetch, threads: int, ahead: int, *, targets: Fetch | None = None) -> None:
        self._fetch, self._targets, self._ahead = fetch, targets or fetch, ahead
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self.waited = 0.0

    def load(self, drawn: Iterator[Drawn], *, images: bool = True) -> Iterator[tuple[Drawn, HostBatch]]:
        """Yield the batches of `drawn` in order, images only where asked for. An error is raised at its place."""
        fetch = self._fetch if images else self._targets
        waiting: deque[tuple[Drawn, Future[HostBatch]]] = deque()
        try:
            for batch in drawn:
                waiting.append((batch, self._pool.submit(fetch, batch.rows, batch.epochs)))
                if len(waiting) > self._ahead:
                    yield self._take(waiting)
            while waiting:
                yield self._take(waiting)
        finally:
            for _, future in waiting:
                future.cancel()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _take(self, waiting: "deque[tuple[Drawn, Future[HostBatch]]]") -> tuple[Drawn, HostBatch]:
        drawn, future = waiting.popleft()
        begun = perf_counter()
        loaded = future.result()
        self.waited += perf_counter() - begun
        return drawn, loaded


class DeviceTransfer:
    """Brings batches to the training device, and standardises targets and normalises images there.

    `pixels` says how the student wants its images; `raw` that batches hold features as teachers emit them.
    """

    def __init__(
        self, corpus: Corpus, device: torch.device, pixels: InputSpec | None = None, *, raw: bool = False
    ) -> None:
        self.corpus, self._device, self._pixels = corpus, device, pixels
        self._standardisers = {key: each.to(device) for key, each in corpus.standardisers(raw=raw).items()}
        self._shapes = {name: source.shapes for name, source in corpus.sources.items()}

    def __call__(self, host: HostBatch) -> Batch:
        """One batch, every tensor on the device."""
        targets = {}
        for name, outputs in self.corpus.wanted.items():
            # Zero as stored is not zero once standardised, unless the codec counts steps from the centre.
            masked = torch.nonzero(host.weights[name] == 0).flatten()
            targets[name] = {output: self._output(host, name, output) for output in outputs}
            if len(masked):
                masked = move(masked, self._device)
                for values in targets[name].values():
                    values.index_fill_(0, masked, 0)
        weights = {name: move(weight, self._device) for name, weight in host.weights.items()}
        images = None
        if host.images is not None and self._pixels is not None:
            images = normalise(move(host.images, self._device), self._pixels)
        return Batch(host.rows, host.epochs, targets, weights, images)

    def _output(self, host: HostBatch, name: str, output: str) -> Tensor:
        pieces = {
            number: self._standardisers[number, name, output](move(host.stored[number, name, output], self._device))
            for number, _ in host.parts
            if (number, name, output) in host.stored
        }
        if len(pieces) == len(host.parts) == 1:
            return next(iter(pieces.values()))
        shape = self._shapes[name][output]
        row = (shape.channels,) if shape.grid is None else (shape.tokens, shape.channels)
        whole = torch.zeros((len(host.rows), *row), device=self._device)
        for number, places in host.parts:
            if number in pieces:
                whole[move(torch.from_numpy(places), self._device)] = pieces[number]
        return whole


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device`, asynchronously on a GPU; no-op if it is already there."""
    if device.type == "cpu" or tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # as it is, where it is pinned already
