"""Ways to read the same features as shuffled batches of standardised bf16 targets, which `read.py` times.

A way is a function of a `Task` that yields batches without end: a tensor by output, [B, C] or [B, T, C].
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from read_data import OUTPUTS, TEACHERS
from torch import Tensor

from kpu import open_cache

BASE: Final = TEACHERS[0]
STEP: Final = 0.05
_BLOCK: Final = 1 << 18  # values that are standardised at a time: they stay in the processor's cache
_SHUFFLE: Final = 1000  # samples in WebDataset's buffer
_AHEAD: Final = 4

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What to read: `outputs` of `rows` samples below `folder`, in batches of `batch`, with so many workers."""

    folder: Path
    rows: int
    batch: int
    outputs: tuple[str, ...]
    workers: int


Way = Callable[[Task], Iterator[Batch]]


def standardise(stored: Tensor, factor: Tensor, offset: Tensor | None) -> Tensor:
    """bf16 of `stored * factor + offset`, of its shape; the same last step for everybody."""
    # NumPy asks for huge pages, torch does not.
    targets = torch.from_numpy(np.empty(stored.shape, np.int16)).view(torch.bfloat16)
    rows = max(1, _BLOCK * len(stored) // stored.numel())
    values = torch.empty((rows, *stored.shape[1:]))
    for part, target in zip(stored.split(rows), targets.split(rows), strict=True):
        some = values[: len(part)].copy_(part)
        target.copy_(some.mul_(factor) if offset is None else torch.addcmul(offset, some, factor, out=some))
    return targets


class _FromHalf:
    """From fp16 features to targets."""

    def __init__(self, task: Task) -> None:
        found = np.load(task.folder / "statistics.npz")
        self._parameters = {}
        for name in task.outputs:
            centre, std = found[f"{name}.centre"], found[f"{name}.std"]
            self._parameters[name] = [torch.from_numpy((x / std).astype("f4")) for x in (np.ones_like(std), -centre)]

    def __call__(self, batch: Mapping[str, Tensor]) -> Batch:
        return {name: standardise(batch[name], *parameters) for name, parameters in self._parameters.items()}


class Stack:
    """Collates samples, dictionaries of fp16 arrays or tensors, into one tensor an output."""

    def __init__(self, outputs: Sequence[str]) -> None:
        self._outputs = outputs

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in self._outputs}


def webdataset(task: Task) -> Iterator[Batch]:
    """Plain tars with a shuffle buffer, tars shuffled."""
    import webdataset as wds

    tars = sorted(str(path) for path in (task.folder / "tars").glob("*.tar"))
    parsed = wds.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(_SHUFFLE).map(_Parse(task.outputs))
    data = parsed.batched(task.batch, collation_fn=Stack(task.outputs), partial=False)
    if task.workers:
        data = wds.WebLoader(data, batch_size=None, num_workers=task.workers, persistent_workers=True)
    return map(_FromHalf(task), _endless(data))


class _Parse:
    """Views of the wanted tensors of a safetensors file, without a copy."""

    def __init__(self, outputs: Sequence[str]) -> None:
        self._outputs = outputs

    def __call__(self, sample: Mapping[str, bytes]) -> dict[str, Any]:
        raw = sample["safetensors"]
        size = int.from_bytes(raw[:8], "little")
        header, data = json.loads(raw[8 : 8 + size]), memoryview(raw)[8 + size :]
        found = {}
        for name in self._outputs:
            first, last = header[name]["data_offsets"]
            found[name] = np.frombuffer(data[first:last], np.float16).reshape(header[name]["shape"])
        return found


def mds(task: Task) -> Iterator[Batch]:
    """MosaicML's streaming, `shuffle=True`."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    data = StreamingDataset(local=str(task.folder / "mds"), shuffle=True, batch_size=task.batch)
    return map(_FromHalf(task), _endless(_loader(torch.utils.data.DataLoader, data, task)))


def litdata(task: Task) -> Iterator[Batch]:
    """The chunks of litData, `shuffle=True`."""
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(task.folder / "litdata"), shuffle=True, drop_last=True)
    return map(_FromHalf(task), _endless(_loader(StreamingDataLoader, data, task)))


def _loader(kind: Any, data: Any, task: Task) -> Any:
    options = {"persistent_workers": True} if task.workers else {}
    return kind(
        data,
        batch_size=task.batch,
        num_workers=task.workers,
        collate_fn=Stack(task.outputs),
        drop_last=True,
        **options,
    )


def _endless(data: Any) -> Iterator[Any]:
    while True:
        yield from data


class Ours:
    """A KPU cache, read as the trainer reads it: order, loader and corpus are the trainer's own.

    With `upload` targets are standardised by the trainer's own upload, as float32, and then cast.
    """

    def __init__(self, cache: str, *, memory: int = 0, upload: bool = False) -> None:
        self._cache, self._memory, self._upload = cache, memory, upload

    def __call__(self, task: Task) -> Iterator[Batch]:
        from trainer.data.corpus import Corpus
        from trainer.data.loading import BatchLoader, DeviceTransfer

        corpus = Corpus([str(task.folder / self._cache)], {BASE: task.outputs}, BASE, memory=self._memory)
        upload, standardisers = DeviceTransfer(corpus, torch.device("cpu")), corpus.standardisers()
        drawn = draw(task, corpus)
        if task.workers:
            hosts = (host for _, host in BatchLoader(corpus.fetch, task.workers, _AHEAD).load(drawn))
        else:
            hosts = (corpus.fetch(batch.rows, batch.epochs) for batch in drawn)
        for host in hosts:
            if self._upload:
                yield {name: x.bfloat16() for name, x in upload(host).targets[BASE].items()}
            else:
                keys = [(0, BASE, name) for name in task.outputs]
                yield {
                    k[2]: standardise(host.stored[k], standardisers[k].factor, standardisers[k].offset) for k in keys
                }


def draw(task: Task, corpus: Any) -> Iterator[Any]:
    """The trainer's order `full`, batch after batch."""
    from trainer.data.loading import Stream
    from trainer.data.order import make_order
    from trainer.sections import OrderConfig

    stream = Stream(make_order(OrderConfig(), corpus.units(), corpus.digest, 0), corpus.validation(0.0))
    position = 0
    while True:
        drawn = stream.draw(position, task.batch)
        position = drawn.position
        yield drawn


def tensorstore(task: Task) -> Iterator[Batch]:
    """The same Zarr arrays by another library, which checks crc32c too, in the trainer's order."""
    import tensorstore as ts

    limit = {"limit": max(1, task.workers)}
    context = ts.Context({"data_copy_concurrency": limit, "file_io_concurrency": limit})
    arrays = {}
    for name in task.outputs:
        store = {"driver": "file", "path": str(task.folder / "zarr.kpu/teachers" / BASE / name)}
        arrays[name] = ts.open({"driver": "zarr3", "kvstore": store}, context=context).result()
    base = open_cache(task.folder / "zarr.kpu").teachers[BASE]
    factor = torch.tensor(STEP)
    offsets = {name: torch.from_numpy(-base.grid(name).offset).float() * STEP for name in task.outputs}
    for rows in _rows(task):
        values = {name: array[rows].read().result() for name, array in arrays.items()}
        yield {name: standardise(torch.from_numpy(x), factor, offsets[name]) for name, x in values.items()}


def memory_map(task: Task) -> Iterator[Batch]:
    """A limit: rows gathered from one memory map of fp16 features."""
    arrays = {name: np.load(task.folder / f"{name}.npy", mmap_mode="r") for name in task.outputs}
    finish = _FromHalf(task)
    for rows in _rows(task):
        yield finish({name: torch.from_numpy(array[rows]) for name, array in arrays.items()})


def raw_reads(task: Task) -> Iterator[Batch]:
    """A limit: the bytes that our reader must read, one call a chunk, neither checked nor decoded."""
    chunks = {name: Chunks(task.folder / "zarr.kpu", name) for name in task.outputs}
    for rows in _rows(task):
        for found in chunks.values():
            for row in rows:
                found.read(int(row))
        yield {}


class Chunks:
    """Where the chunks of the rows of one output lie, read from the shards' own indices."""

    def __init__(self, cache: Path, output: str) -> None:
        folder = cache / "teachers" / BASE / output
        shape = json.loads((folder / "zarr.json").read_text())
        self._unit_rows = shape["chunk_grid"]["configuration"]["chunk_shape"][0]
        self.chunk_rows = shape["codecs"][0]["configuration"]["chunk_shape"][0]
        tail = "/".join("0" for _ in shape["shape"][1:])
        count = len(list((folder / "c").iterdir()))
        self._files = [os.open(folder / "c" / str(unit) / tail, os.O_RDONLY) for unit in range(count)]
        self._indices = [self._index(file) for file in self._files]

    def _index(self, file: int) -> Any:
        size = 16 * self._unit_rows // self.chunk_rows
        raw = os.pread(file, size, os.fstat(file).st_size - 4 - size)
        return np.frombuffer(raw, "<u8").reshape(-1, 2).tolist()

    def read(self, row: int) -> bytes:
        """The stored bytes of the chunk that holds a row."""
        unit, within = divmod(row, self._unit_rows)
        offset, size = self._indices[unit][within // self.chunk_rows]
        return os.pread(self._files[unit], size, offset)


def _rows(task: Task) -> Iterator[Any]:
    """Rows in random order without end, in batches."""
    for epoch in itertools.count():
        order = np.random.default_rng(epoch).permutation(task.rows)
        yield from order[: task.rows // task.batch * task.batch].reshape(-1, task.batch)


PEERS: Final[dict[str, Way]] = {"WebDataset": webdataset, "MDS": mds, "litData": litdata}
OURS: Final[dict[str, Way]] = {
    "KPU": Ours("zarr.kpu"),
    "KPU, float32 first": Ours("zarr.kpu", upload=True),
    "KPU, rows kept in memory": Ours("zarr.kpu", memory=1 << 40),
    "KPU in tars": Ours("tars.kpu"),
}
LIMITS: Final[dict[str, Way]] = {
    "our Zarr by tensorstore": tensorstore,
    "limit: our bytes, not decoded": raw_reads,
    "limit: memory map of fp16": memory_map,
}
WAYS: Final = {**PEERS, **OURS, **LIMITS}
ALL_OUTPUTS: Final = tuple(output.name for output in OUTPUTS)
