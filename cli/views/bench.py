"""What `kpu-cache bench` prints for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from cli.views.tables import Table
from cli.views.units import human_bytes

if TYPE_CHECKING:
    from kpu.tools.bench import Bench, CodecTrial


def show_bench(console: Console, result: Bench) -> None:
    """One table of rates and one of codecs."""
    console.print(
        f"reading {result.rows:,} rows of {result.path}, each timed the second time: from memory, where the system "
        "keeps what it read\n",
        markup=False,
        soft_wrap=True,
    )
    columns = ("teacher", "output", "bytes/row", "random rows/s", "read/s", "windowed rows/s", "read/s")
    table = Table(*columns, "limits: raw read", "memory copy", left=2)
    for reading in result.readings:
        table.add_row(
            reading.teacher,
            reading.output,
            human_bytes(reading.stored_bytes),
            f"{reading.random.rows_per_second:,.0f}",
            human_bytes(reading.random.bytes_per_second),
            f"{reading.windowed.rows_per_second:,.0f}",
            human_bytes(reading.windowed.bytes_per_second),
            f"{reading.raw.rows_per_second:,.0f}",
            f"{reading.copy.rows_per_second:,.0f}",
        )
    table.show(console)
    console.print("limits in rows/s: the files read from end to end and not decoded; decoded rows copied in memory\n")
    table = Table("teacher", "output", "codec", "of fp16", "RMSE (std)", "cosine", "worst row", left=3)
    for tried in result.codecs:
        numbers = f"{tried.of_fp16:.3f}", f"{tried.rmse:.5f}", f"{tried.cosine:.6f}", f"{tried.worst:.5f}"
        table.add_row(tried.teacher, tried.output, _codec(tried), *numbers)
    table.show(console)
    for step in sorted({tried.grid for tried in result.codecs if tried.grid is not None}):
        names = sorted({tried.teacher for tried in result.codecs if tried.grid == step})
        console.print(
            f"{', '.join(names)}: these features lie on a grid of step {step:g} already, so errors and sizes are those "
            "of coding them once more; steps near it or finer say little. Extract some rows with fp32 for true ones",
            markup=False,
            soft_wrap=True,
        )


def _codec(tried: CodecTrial) -> str:
    return tried.codec if tried.step is None else f"{tried.codec} {tried.step:g}"
