"""Targets as the codecs of others would give them back: a cache's lossless ones, stored and restored on the way."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from codec_peers import VECTORS, Codec, chunks_of, peers

from kpu import open_cache

if TYPE_CHECKING:
    from trainer.data.corpus import HostBatch

ROWS: Final = 256  # that sizes are taken from
Outputs = dict[tuple[str, str], Codec]
"""By teacher and output."""


def peers_of(lossless: Path) -> dict[str, Outputs]:
    """By name, without those that give the same values as another one, or as a codec of the project."""
    cache, found = open_cache(lossless), dict[str, Outputs]()
    for name, teacher in cache.teachers.items():
        for output, statistics in teacher.statistics.items():
            for codec in peers(statistics):
                if codec.name not in ("fp16 + zstd", "fp8 e4m3", "uniform 0.05, PCodec"):
                    found.setdefault(codec.name, {})[name, output] = codec
    return found


def size_of(lossless: Path, outputs: Outputs) -> float:
    """Bytes of all features against fp16."""
    cache, size, values = open_cache(lossless), 0.0, 0
    rows = np.flatnonzero(cache.valid(slice(0, ROWS)))
    for (name, output), codec in outputs.items():
        features = cache.read(name, output, rows)
        chunks = chunks_of(codec.store(features))
        together = 1 if features.ndim == 3 else VECTORS  # rows in a chunk
        size += sum(len(codec.pack(chunk)) for chunk in chunks) / (together * len(chunks))
        values += math.prod(features.shape[1:])
    return size / (2 * values)


def restored(outputs: Outputs) -> Callable[..., Any]:
    """What `fit` takes for `live`."""

    def live(_corpus: object, _config: object, fetch: Callable[..., "HostBatch"]) -> Callable[..., "HostBatch"]:
        def through(*drawn: Any) -> "HostBatch":
            host = fetch(*drawn)
            stored = {
                key: torch.from_numpy(outputs[key[1:]].restore(outputs[key[1:]].store(features.numpy())))
                for key, features in host.stored.items()
            }
            return replace(host, stored=stored)

        return through

    return live
