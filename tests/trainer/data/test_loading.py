"""Batches: their order, what they do not depend on, and reading ahead."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.conftest import Configure
from trainer.data import loading
from trainer.data.corpus import Corpus, HostBatch
from trainer.data.loading import BatchLoader, DeviceTransfer, Drawn, Stream, loader_threads
from trainer.data.order import FullOrder

OUTPUTS = ("global", "patch")
CPU = torch.device("cpu")


def stream_of(rows: int = 50, held: int = 5) -> Stream:
    held_back = np.zeros(rows, bool)
    held_back[:held] = True
    return Stream(FullOrder(rows, "digest", 3), held_back)


def drawn_rows(stream: Stream, sizes: list[int], position: int = 0) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for size in sizes:
        drawn = stream.draw(position, size)
        position = drawn.position
        found += zip(drawn.epochs.tolist(), drawn.rows.tolist(), strict=True)
    return found


def test_every_epoch_gives_each_row_that_is_not_held_back_once() -> None:
    found = drawn_rows(stream_of(), [7] * 13)[:90]
    for epoch in (0, 1):
        assert sorted(row for number, row in found if number == epoch) == list(range(5, 50))
    assert found[:45] != found[45:]


def test_the_sequence_does_not_depend_on_batch_sizes() -> None:
    assert drawn_rows(stream_of(), [8] * 12) == drawn_rows(stream_of(), [1, 95])


def test_a_position_is_where_the_next_batch_begins() -> None:
    whole = drawn_rows(stream_of(), [10] * 9)
    stream, position = stream_of(), 0
    for count in range(1, 9):
        position = stream.draw(position, 10).position
        assert drawn_rows(stream, [10], position) == whole[10 * count : 10 * count + 10]


def test_batches_are_identical_under_any_teachers_and_place_in_a_batch(toys: Path) -> None:
    rows = np.random.default_rng(0).permutation(70)
    whole = Corpus([str(toys)], dict.fromkeys(["general", "big", "shy"], OUTPUTS), "general")
    pair = Corpus([str(toys)], {"general": OUTPUTS, "shy": ("patch",)}, "general", memory=2**20)
    batch, split = DeviceTransfer(whole, CPU)(whole.fetch(rows)), DeviceTransfer(pair, CPU)
    for part in np.array_split(np.arange(70), 9):
        other = split(pair.fetch(rows[part]))
        for teacher, outputs in other.targets.items():
            assert torch.equal(other.weights[teacher], batch.weights[teacher][part])
            for output, values in outputs.items():
                assert torch.equal(values, batch.targets[teacher][output][part])


def numbered(rows: np.ndarray, epochs: np.ndarray) -> HostBatch:
    time.sleep(0.002 * (rows[0] % 3))
    return HostBatch(rows, epochs, (), {}, {})


def draws(count: int) -> list[Drawn]:
    return [Drawn(np.array([i]), np.array([0]), i + 1) for i in range(count)]


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (3, 1), (3, 8)])
def test_batches_come_in_order_whatever_the_threads(threads: int, ahead: int) -> None:
    with BatchLoader(numbered, threads, ahead) as loader:
        found = [(drawn.position, int(host.rows[0])) for drawn, host in loader.load(iter(draws(20)))]
    assert found == [(i + 1, i) for i in range(20)]


@pytest.mark.parametrize(("cores", "expected"), [(1, 2), (8, 4), (128, 8)])
def test_more_threads_read_where_a_gpu_waits_for_images(
    cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "usable_cores", lambda: cores)
    gpu = torch.device("cuda")
    found = [loader_threads(device, images=images) for device, images in ((CPU, True), (gpu, False), (gpu, True))]
    assert found == [2, 2, expected]


def test_no_more_is_read_than_asked_for_and_little_ahead() -> None:
    asked: list[int] = []
    lock = threading.Lock()

    def fetch(rows: np.ndarray, epochs: np.ndarray) -> HostBatch:
        with lock:
            asked.append(int(rows[0]))
        return numbered(rows, epochs)

    with BatchLoader(fetch, 2, 3) as loader:
        loaded = loader.load(iter(draws(100)))
        next(loaded)
    assert max(asked) <= 4


def test_rows_are_read_without_images_where_nobody_looks() -> None:
    def pictured(rows: np.ndarray, epochs: np.ndarray) -> HostBatch:
        return replace(numbered(rows, epochs), images=torch.zeros(len(rows), 1, 1, 3, dtype=torch.uint8))

    with BatchLoader(pictured, 2, 2, targets=numbered) as loader:
        seen, unseen = (list(loader.load(iter(draws(5)), images=images)) for images in (True, False))
    assert [drawn.position for drawn, _ in unseen] == [drawn.position for drawn, _ in seen]
    assert all(host.images is not None for _, host in seen)
    assert all(host.images is None for _, host in unseen)


def test_an_error_comes_at_its_place() -> None:
    def fetch(rows: np.ndarray, epochs: np.ndarray) -> HostBatch:
        if rows[0] == 3:
            raise OSError("gone")
        return numbered(rows, epochs)

    found = []
    with BatchLoader(fetch, 2, 2) as loader, pytest.raises(OSError, match="gone"):
        for drawn, _ in loader.load(iter(draws(10))):
            found.append(drawn.position)
    assert found == [1, 2, 3]


def test_the_configured_batch_is_shared_evenly(configure: Configure) -> None:
    assert configure(workers=4).batch_size == 16
    with pytest.raises(Exception, match="share evenly"):
        configure(workers=3)
