"""What reading leaves of a thread that launches small operations, as one that trains on a GPU does.

    python benchmarks/beside.py my.kpu --teacher general --output patch

Random rows are read by one thread, in batches of 256, by each of the two readers (`kpu.reading.tensorstore` says
which serves when), while the main thread launches operations that take no time by themselves.
"""

import threading
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from kpu import Cache, open_cache
from kpu.reading import tensorstore

SECONDS = 4.0
BATCH = 256


def launch(seconds: float = SECONDS) -> float:
    """Operations a second."""
    tensor, count, begun = torch.zeros(8), 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        for _ in range(100):
            tensor.add_(1)
        count += 100
    return count / (time.perf_counter() - begun)


def beside(cache: Cache, teacher: str, output: str) -> tuple[float, float]:
    """Operations a second, and rows a second that another thread reads meanwhile."""
    rows = np.random.default_rng(0).permutation(cache.rows)
    batches = np.resize(rows, (max(1, len(rows) // BATCH), BATCH))
    ended, done = threading.Event(), 0

    def load() -> None:
        nonlocal done
        while not ended.is_set():
            cache.read_encoded(teacher, output, batches[done % len(batches)])
            done += 1

    thread = threading.Thread(target=load)
    thread.start()
    launch(1.0)
    before, begun = done, time.perf_counter()
    rate = launch()
    loaded = (done - before) * BATCH / (time.perf_counter() - begun)
    ended.set()
    thread.join()
    return rate, loaded


def main(
    path: Annotated[Path, typer.Argument(help="A cache in Zarr.")],
    teacher: Annotated[str, typer.Option(help="Of the cache.")],
    output: Annotated[str, typer.Option(help="Of the teacher.")] = "patch",
) -> None:
    """Print operations and rows a second."""
    torch.set_num_threads(1)
    alone = launch()
    print(f"nothing is read: {alone:,.0f} operations/s")
    for name, fewest in (("our own reader", 10**6), ("tensorstore", 1)):
        tensorstore.FEWEST_CORES = fewest
        rate, loaded = beside(open_cache(path), teacher, output)
        print(f"{name}: {rate:,.0f} operations/s ({rate / alone:.2f}) beside {loaded:,.0f} rows/s")


if __name__ == "__main__":
    typer.run(main)
