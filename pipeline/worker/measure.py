"""Timing one worker's stages on a few batches, with a grid made from those batches alone."""

import resource
import sys
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from time import perf_counter

from kpu.format.codecs import QuantGrid
from kpu.format.teacher import OutputSpec, ShardFormat
from kpu.records.plan import MAX_CHUNK_ROWS
from kpu.records.teachers import shard_layout
from kpu.shards.writer import encode_shard
from pipeline.run.reports import Stopwatch
from pipeline.worker.unit_buffer import QuantisedFeatures


@dataclass(frozen=True)
class Measurement:
    """Rows a second of each stage and of all together, bytes a row by teacher and output, resident memory in bytes."""

    rows: int
    rows_per_second: float
    stage_rates: dict[str, float]
    bytes_per_row: dict[str, dict[str, float]]
    resident_bytes: int


def measurement(rows: int, started: float, watch: Stopwatch, sizes: dict[str, dict[str, int]]) -> Measurement:
    """Put together what was timed since `started` (perf_counter)."""
    busy = {stage: seconds for stage, seconds in watch.seconds.items() if seconds > 0}
    return Measurement(
        rows=rows,
        rows_per_second=rows / (perf_counter() - started),
        stage_rates={stage: rows / seconds for stage, seconds in busy.items()},
        bytes_per_row={name: {o: size / rows for o, size in outputs.items()} for name, outputs in sizes.items()},
        resident_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )


def encoded_sizes(
    features: QuantisedFeatures,
    outputs: tuple[OutputSpec, ...],
    grids: Mapping[str, QuantGrid],
    shards: ShardFormat,
    pool: Executor | None = None,
) -> dict[str, int]:
    """Bytes of each output's shard, as `extract` would write it; compressed in the threads of `pool`."""
    sizes = {}
    for output in outputs:
        stored = features.outputs[output.name].stored
        grid = grids[output.name]
        unit_rows = -(-len(stored) // MAX_CHUNK_ROWS) * MAX_CHUNK_ROWS
        layout = shard_layout(len(stored), unit_rows, "teacher", shards, output, grid)
        sizes[output.name] = len(encode_shard(stored, layout, 0, pool=pool).data)
    return sizes
