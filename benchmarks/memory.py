"""Planning a very large source: time, and the driver's peak memory, which must not grow with the number of rows.

    python benchmarks/memory.py --rows 1e6 1e7 1e8

Each size is planned in a process of its own, from real Parquet files (one image struct and one label a row; the images
are one byte, since planning opens none), with the function that `kpu-cache extract` uses.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import pyarrow as pa
import pyarrow.parquet as pq

FILE_ROWS, GROUP_ROWS = 1_000_000, 1_000


def write_source(folder: Path, rows: int) -> None:
    """Parquet files of a million rows; all are links to one file, under names of their own."""
    count = min(FILE_ROWS, rows)
    image = pa.StructArray.from_arrays([pa.array([b"x"] * count), pa.nulls(count, pa.string())], ["bytes", "path"])
    first = folder / "part-00000.parquet"
    pq.write_table(pa.table({"image": image, "label": pa.array(range(count))}), first, row_group_size=GROUP_ROWS)
    for index in range(1, -(-rows // FILE_ROWS)):
        os.link(first, folder / f"part-{index:05d}.parquet")


def plan(folder: Path) -> None:
    """Plan everything in `folder`, then look for what is left to do as `extract` does; print what it took."""
    from kpu.format.teacher import CodecSpec, InputSpec, OutputSpec, TeacherSpec
    from kpu.sources import open_source
    from kpu.storage.leases import lease
    from kpu.storage.open import open_storage
    from pipeline.config import validate_config
    from pipeline.extract import remaining_tasks
    from pipeline.planning import plan_cache
    from pipeline.run.observers import Silent

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    out = folder / "big.kpu"
    config = validate_config(
        {
            "data": {"source": str(folder / "*.parquet")},
            "out": str(out),
            "teachers": {"vit": {"model": "timm:vit_small_patch16_224"}},
        },
        "benchmark",
    )
    teacher = TeacherSpec(
        name="vit", model="timm:vit_small_patch16_224", weights=None, weights_digest="0" * 32,
        input=InputSpec(size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3), precision="bf16",
        outputs=(OutputSpec(name="global", shape=(384,)), OutputSpec(name="patch", shape=(196, 384), grid=(14, 14))),
        codec=CodecSpec(),
    )  # fmt: skip
    start = perf_counter()
    storage = open_storage(out, create=True)
    with lease(storage, "benchmark"):
        made = plan_cache(storage, open_source(config.data), config, [teacher], 2, "benchmark", Silent())
    tasks = sum(1 for _ in remaining_tasks(storage, made, config, None))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = perf_counter() - start
    print(
        f"{made.rows:>12,} rows, {tasks:>9,} units of {made.unit_rows}: {seconds:7.1f} s, peak {peak:6,.0f} MiB "
        f"({before:,.0f} MiB before planning)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=float, default=[1e6, 1e7, 1e8])
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan is not None:
        plan(arguments.plan)
        return
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory(prefix="kpu-bench-") as folder:
            write_source(Path(folder), int(rows))
            subprocess.run([sys.executable, __file__, "--plan", folder], check=True)


if __name__ == "__main__":
    main()
