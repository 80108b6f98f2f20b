"""The same synthetic features on disk in every format that `read.py` compares."""

import json
import shutil
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from kpu.commit.plan import publish_plan
from kpu.commit.teacher import publish_teacher
from kpu.commit.unit import EncodedOutput, UnitFeatures
from kpu.commit.writer import CacheWriter
from kpu.format.fidelity import RowFidelity, measure
from kpu.format.plan import Plan, SourceSpec
from kpu.format.statistics import Accumulator, Statistics
from kpu.format.teacher import CodecSpec, InputSpec, OutputSpec, ShardFormat, TeacherSpec
from kpu.records.images import UnitImages
from kpu.records.samples import Samples, sample_schema, split_parts
from kpu.storage.leases import lease
from kpu.storage.open import open_storage

TOKENS: Final = 197
CHANNELS: Final = 384
OUTPUTS: Final = (
    OutputSpec(name="global", shape=(CHANNELS,)),
    OutputSpec(name="patch", shape=(TOKENS, CHANNELS), grid=(1, TOKENS)),
)
TEACHERS: Final = ("one", "two", "three")
UNIT_ROWS: Final = 512
PART_ROWS: Final = 256  # samples a tar, and of one draw of random numbers
RUN: Final = "benchmark"

Part = dict[str, np.ndarray[Any, Any]]


def features(rows: int) -> Iterator[Part]:
    """float32 `global` [n, C] and `patch` [n, T, C]: heavy-tailed, 2% outlier tokens, unequal channels."""
    fixed = np.random.default_rng(0)
    scale, offset = np.exp(fixed.normal(0, 1, CHANNELS)), fixed.normal(0, 1, CHANNELS)
    for first in range(0, rows, PART_ROWS):
        rng = np.random.default_rng([1, first])
        count = min(PART_ROWS, rows - first)
        part = {}
        for output in OUTPUTS:
            x = rng.standard_t(4, (count, *output.shape)) * scale + offset
            x[rng.random(x.shape[:-1]) < 0.02] *= 10
            part[output.name] = x.astype(np.float32)
        yield part


def make(folder: Path, rows: int) -> None:
    """Write `rows` samples in every format below `folder`, unless they stand there already."""
    stamp = folder / "made.json"
    if stamp.exists() and json.loads(stamp.read_text()) == {"rows": rows}:
        return
    if folder.exists() and not stamp.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder}: expected a new or empty folder, or what this made before, found other files")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    half = {o.name: np.lib.format.open_memmap(folder / f"{o.name}.npy", "w+", "f2", (rows, *o.shape)) for o in OUTPUTS}
    accumulators = {output.name: Accumulator(CHANNELS) for output in OUTPUTS}
    for number, part in enumerate(features(rows)):
        for name, x in part.items():
            half[name][number * PART_ROWS :][: len(x)] = x
            accumulators[name].update(x.reshape(-1, CHANNELS)[:20_000])
    statistics = {name: accumulator.finish(0.05) for name, accumulator in accumulators.items()}
    np.savez(
        folder / "statistics.npz",
        **{f"{name}.{field}": getattr(s, field) for name, s in statistics.items() for field in ("centre", "std")},
    )
    write_cache(folder / "zarr.kpu", rows, statistics, TEACHERS, "zarr")
    write_cache(folder / "tars.kpu", rows, statistics, TEACHERS[:1], "webdataset")
    write_tars(folder / "tars", half)
    stamp.write_text(json.dumps({"rows": rows}))


def write_cache(
    path: Path, rows: int, statistics: dict[str, Statistics], teachers: tuple[str, ...], shards: ShardFormat
) -> None:
    """A cache in which every teacher gives the same features, by the calls that an extraction makes."""
    storage = open_storage(path, create=True)
    with lease(storage, RUN):
        plan = publish_plan(storage, split_parts(iter([_samples(rows)]), UNIT_ROWS), _plan, RUN, unit_rows=UNIT_ROWS)
        specs = [_teacher(name, shards) for name in teachers]
        published = [publish_teacher(storage, plan, spec, statistics, None, RUN) for spec in specs]
        parts = features(rows)
        for unit in range(plan.units):
            count = len(plan.unit_range(unit))
            transaction = CacheWriter(storage, plan, RUN).unit(unit, Samples(storage, plan).unit(unit))
            images = UnitImages(np.zeros((count, 16), np.uint8), np.zeros(count, np.uint8), np.ones((count, 2), "i4"))
            transaction.images(images)
            drawn = [next(parts) for _ in range(-(-count // PART_ROWS))]
            whole = {output.name: np.concatenate([part[output.name] for part in drawn]) for output in OUTPUTS}
            encoded = {}
            for name, x in whole.items():
                grid = published[0].grids[name]
                stored = grid.encode(x)
                encoded[name] = EncodedOutput(stored, _fidelity(x, grid.decode(stored), statistics[name]))
            for teacher in published:
                transaction.teacher(teacher, _Features(encoded, np.ones(count, bool)))


def _fidelity(x: Any, decoded: Any, statistics: Statistics) -> RowFidelity:
    """Of the first rows alone, repeated: what is measured elsewhere need not be exact here."""
    few = measure(x[:8], decoded[:8], np.zeros(x[:8].shape, bool), statistics)
    repeat = np.arange(len(x)) % 8
    return RowFidelity(few.squared_error[repeat], few.cosine[repeat], few.saturated[repeat])


class _Features(UnitFeatures):
    def measure(self, output: str, stored: Any) -> RowFidelity:
        raise RuntimeError(
            f"{output}: another run wrote {len(stored)} rows into this benchmark's cache; remove its folder first"
        )


def _samples(rows: int) -> pa.Table:
    keys = [f"{row:08d}.png" for row in range(rows)]
    columns = {
        "key": pa.array(keys),
        "view": pa.array(np.zeros(rows, np.int32)),
        "file": pa.array(keys),
        "label": pa.nulls(rows, pa.int64()),
        "draws": pa.nulls(rows, pa.list_(pa.float64())),
    }
    return pa.table(columns, schema=sample_schema("folder"))


def _plan(fingerprint: str, digests: tuple[str, ...], samples: int, metadata: dict[str, str]) -> Plan:
    return Plan(
        source=SourceSpec(kind="folder", root="synthetic"),
        fingerprint=fingerprint,
        classes=None,
        samples=samples,
        views=1,
        seed=0,
        unit_rows=UNIT_ROWS,
        threads=1,
        samples_digests=digests,
        metadata=metadata,
    )


def _teacher(name: str, shards: ShardFormat) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        model=f"torch:synthetic.py:{name}",
        weights=None,
        weights_digest="00" * 16,
        input=InputSpec(size=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        precision="fp32",
        outputs=OUTPUTS,
        codec=CodecSpec(),
        format=shards,
    )


def write_tars(folder: Path, half: dict[str, Any]) -> None:
    """Theia's layout: one safetensors file a sample in plain tars."""
    from safetensors.numpy import save

    folder.mkdir()
    rows = len(half["global"])
    for first in range(0, rows, PART_ROWS):
        with tarfile.open(folder / f"{first // PART_ROWS:06d}.tar", "w") as tar:
            for row in range(first, min(first + PART_ROWS, rows)):
                data = save({name: np.ascontiguousarray(x[row]) for name, x in half.items()})
                info = tarfile.TarInfo(f"{row:08d}.safetensors")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))


def write_mds(folder: Path, half: dict[str, Any]) -> None:
    """MDS with a column an output, in shards of 64 MB."""
    from streaming import MDSWriter

    columns = {o.name: f"ndarray:float16:{','.join(map(str, o.shape))}" for o in OUTPUTS}
    with MDSWriter(out=str(folder), columns=columns, size_limit=64 << 20) as writer:
        for row in range(len(half["global"])):
            writer.write({name: np.ascontiguousarray(x[row]) for name, x in half.items()})


def sample_of(row: int, half: Path) -> dict[str, Any]:
    """What litData stores of one row: fp16 tensors."""
    import torch

    return {o.name: torch.from_numpy(np.load(half / f"{o.name}.npy", mmap_mode="r")[row].copy()) for o in OUTPUTS}


def write_litdata(folder: Path, half: Path, rows: int) -> None:
    """The chunks that litData optimises, 64 MB each."""
    from functools import partial

    from litdata import optimize

    optimize(partial(sample_of, half=half), list(range(rows)), output_dir=str(folder), chunk_bytes="64MB",
             num_workers=1, keep_data_ordered=True, start_method="spawn", verbose=False)  # fmt: skip
