"""How well orders mix, and what they cost: `windowed` by its window, WebDataset's shuffle buffer and MDS's py1e.

    python benchmarks/order.py                      # a million rows in shards of 1,024; no data is needed

Of each order: distinct shards in a batch, relative to a full permutation; how far a row lands from where it is stored,
and how far two rows land from each other that are neighbours on disk, both relative to a full permutation; what must be
held for each shard to be read once only: all shards between their first and their last row, or for WebDataset its
buffer. Sizes are those of 197 x 384 features: 61.6 kB a row in our default codec, 152 kB in fp16. Peers' orders come
from the released packages' own functions; one that is not installed is left out (see read.py).
"""

import random
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Annotated, Final

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

from trainer.data.order import FullOrder, WindowedOrder

OURS: Final = 61_600  # bytes of a row
HALF: Final = 152_000
I64 = npt.NDArray[np.int64]
app = typer.Typer(add_completion=False)


@app.command()
def main(
    rows: Annotated[int, typer.Option(help="Rows of an epoch.")] = 1_000_000,
    shard: Annotated[int, typer.Option(help="Rows of a shard.")] = 1024,
    batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 256,
    seed: Annotated[int, typer.Option(help="Of every order.")] = 0,
) -> None:
    """Measure every order, and print the table."""
    starts = np.append(np.arange(0, rows, shard), rows)
    uniform = FullOrder(rows, "order", seed).take(0, 0, rows)
    reference = _mixing(uniform, shard, batch)
    table = Table(title=f"{rows:,} rows in shards of {shard:,}; batches of {batch}; relative to a full permutation")
    for column in ("order", "shards a batch", "displacement", "neighbours apart", "rows held", "bytes held"):
        table.add_column(column, justify="left" if column == "order" else "right")
    table.add_row("full", "1.000", "1.000", "1.000", f"{rows:,}", _size(rows * OURS))
    for name, make, held, row_bytes in _orders(rows, shard, seed, starts):
        order = make()
        assert np.array_equal(np.sort(order), np.arange(rows)), f"{name} is no permutation"
        found = [x / y for x, y in zip(_mixing(order, shard, batch), reference, strict=True)]
        rows_held = held or _open_shards(order, shard) * shard
        table.add_row(name, *(f"{x:.3f}" for x in found), f"{rows_held:,}", _size(rows_held * row_bytes))
    Console(width=130).print(table)


def _orders(rows: int, shard: int, seed: int, starts: I64) -> Iterator[tuple[str, Callable[[], I64], int | None, int]]:
    """Name, the order int64 [rows], rows held where it is not by whole shards, bytes of a row."""
    for window in (1, 4, 16, 64, 256):

        def windowed(window: int = window) -> I64:
            return WindowedOrder(starts, "order", seed, window).take(0, 0, rows)

        yield f"windowed, {window} shards", windowed, None, OURS
    if find_spec("webdataset"):
        for buffer in (1_000, 64 * shard * OURS // HALF, 64 * shard):

            def buffered(buffer: int = buffer) -> I64:
                return _webdataset(rows, shard, seed, buffer)

            yield f"WebDataset, buffer of {buffer:,}", buffered, buffer, HALF
    if find_spec("streaming"):
        for block in (16 * shard, 64 * shard, 1 << 18):

            def mds(block: int = block) -> I64:
                from streaming.base.shuffle.py1e import get_shuffle_py1e

                return np.asarray(get_shuffle_py1e(np.diff(starts), 1, seed, 0, block), np.int64)

            note = " (its default)" if block == 1 << 18 else ""
            yield f"MDS py1e, blocks of {block:,}{note}", mds, None, HALF


def _webdataset(rows: int, shard: int, seed: int, buffer: int) -> I64:
    """Shards shuffled, then a shuffle buffer, by the library's own function."""
    from webdataset.filters import _shuffle

    rng = random.Random(seed)
    shards = list(range(0, rows, shard))
    rng.shuffle(shards)
    stored = (row for first in shards for row in range(first, min(first + shard, rows)))
    return np.fromiter(_shuffle(stored, bufsize=buffer, initial=buffer, rng=rng), np.int64, rows)


def _mixing(order: I64, shard: int, batch: int) -> tuple[float, float, float]:
    """Mean distinct shards in a batch, displacement from the stored place, distance of stored neighbours."""
    batches = np.sort(order[: len(order) // batch * batch].reshape(-1, batch) // shard, axis=1)
    distinct = 1 + np.count_nonzero(np.diff(batches, axis=1), axis=1)
    places = np.argsort(order)
    displacement = np.abs(places - np.arange(len(order)))
    return float(distinct.mean()), float(displacement.mean()), float(np.abs(np.diff(places)).mean())


def _open_shards(order: I64, shard: int) -> int:
    """The most shards that are between their first and their last row at once."""
    shards = order // shard
    count = int(shards.max()) + 1
    first, last = np.full(count, len(order)), np.zeros(count, np.int64)
    np.minimum.at(first, shards, np.arange(len(order)))
    np.maximum.at(last, shards, np.arange(len(order)))
    change = np.zeros(len(order) + 1, np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, last + 1, -1)
    return int(np.cumsum(change).max())


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"


if __name__ == "__main__":
    app()
