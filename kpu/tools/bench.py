"""How fast a cache reads here, against what limits it, and what other codecs would make of its features."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kpu.errors import ConfigError
from kpu.format.codecs import for_codec, make_grid
from kpu.format.fidelity import measure
from kpu.format.plan import Plan
from kpu.format.statistics import Statistics
from kpu.format.teacher import CodecSpec, OutputSpec
from kpu.reading.cache import Cache
from kpu.records.plan import require_plan
from kpu.records.teachers import output_shard, shard_layout
from kpu.shards.writer import encode_shard
from kpu.storage.counting import CountingStorage
from kpu.storage.open import open_storage

STEPS: Final = (0.02, 0.05, 0.1, 0.2)
CODECS: Final = (
    *(CodecSpec(name="uniform", step=step) for step in STEPS),
    *(CodecSpec(name="rotated", step=step) for step in STEPS),
    CodecSpec(name="fp16"),
    CodecSpec(name="bf16"),
    CodecSpec(name="fp32"),
)
_BATCH: Final = 256  # rows of one read
_CODEC_ROWS: Final = 256
_CODEC_BYTES: Final = 128 << 20  # of features that codecs are tried on, as float32
_COPIED: Final = 64 << 20
_PIECE: Final = 8 << 20

RowNumbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rate:
    """Rows a second, and the stored bytes that were read for them a second."""

    rows_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class Reading:
    """One output of one teacher. `stored_bytes` and `decoded_bytes` are of one row.

    `random` reads rows from anywhere, `windowed` the mixed rows of a few whole units. Their limits: `raw` reads the
    files of those units from end to end and does nothing with them, `copy` copies decoded rows in memory.
    """

    teacher: str
    output: str
    stored_bytes: float
    decoded_bytes: int
    random: Rate
    windowed: Rate
    raw: Rate
    copy: Rate


@dataclass(frozen=True)
class CodecTrial:
    """What a codec makes of `rows` rows of an output: size against fp16, and errors in channel standard deviations.

    `worst` is the RMSE of the worst row. The features are those that the cache holds; `grid` is the step that they
    were stored on, None if they were stored as floating-point numbers.
    """

    teacher: str
    output: str
    codec: str
    step: float | None
    rows: int
    of_fp16: float
    rmse: float
    cosine: float
    worst: float
    grid: float | None


@dataclass(frozen=True)
class Bench:
    """What was measured on the cache at `path`, reading `rows` rows at most."""

    path: str
    rows: int
    readings: tuple[Reading, ...]
    codecs: tuple[CodecTrial, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench(
    path: str,
    *,
    teachers: Sequence[str] = (),
    rows: int = 1024,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Bench:
    """Measure every output of the named teachers, or of all; everything is read twice and timed the second time.

    Raises:
        NotACacheError: there is no cache.
        ConfigError: there is no such teacher, or none with a committed unit.
        CorruptError: what had to be read is damaged.
    """
    storage = CountingStorage(open_storage(path))
    cache = Cache(storage, require_plan(storage))
    for name in teachers:
        if name not in cache.teachers:
            raise ConfigError(f"teacher {name!r}: expected one of {sorted(cache.teachers)} in {cache.path}")
    units = {name: np.flatnonzero(cache.teachers[name].committed()) for name in teachers or cache.teachers}
    found = [(name, output) for name in units if len(units[name]) for output in cache.teachers[name].outputs.values()]
    if not found:
        raise ConfigError(f"{cache.path}: expected a teacher with a committed unit, found none; extract one first")
    copied = _copy_speed()
    readings: list[Reading] = []
    codecs: list[CodecTrial] = []
    for number, (name, output) in enumerate(found):
        if progress:
            progress(number, len(found))
        readings.append(_reading(cache, storage, name, output, units[name], rows, seed, copied))
        codecs += _try_codecs(cache, name, output, units[name], rows, seed)
    return Bench(cache.path, min(rows, cache.rows), tuple(readings), tuple(codecs))


def _reading(
    cache: Cache,
    storage: CountingStorage,
    name: str,
    output: OutputSpec,
    units: RowNumbers,
    rows: int,
    seed: int,
    copied: float,
) -> Reading:
    rng = np.random.default_rng(seed)
    everywhere = draw_rows(rng, cache.plan, units, rows)
    few = rng.permutation(units)[: -(-rows // cache.plan.unit_rows)]
    window = draw_rows(rng, cache.plan, few, rows)
    whole = sum(len(cache.plan.unit_range(int(unit))) for unit in few)
    teacher = cache.teachers[name].published
    keys = [output_shard(teacher, output, int(unit)) for unit in few]
    stored = sum(storage.size(key) or 0 for key in keys) / whole
    decoded = teacher.layouts[output.name].row_bytes

    def read(wanted: RowNumbers) -> int:
        for first in range(0, len(wanted), _BATCH):
            cache.read_encoded(name, output.name, wanted[first : first + _BATCH])
        return len(wanted)

    def read_raw() -> int:
        for key in keys:
            handle = storage.open(key)
            for first in range(0, handle.size, _PIECE):
                handle.read(first, min(_PIECE, handle.size - first))
            handle.close()
        return whole

    return Reading(
        teacher=name,
        output=output.name,
        stored_bytes=stored,
        decoded_bytes=decoded,
        random=_rate(storage, lambda: read(everywhere)),
        windowed=_rate(storage, lambda: read(window)),
        raw=_rate(storage, read_raw),
        copy=Rate(copied / decoded, copied),
    )


def _rate(storage: CountingStorage, work: Callable[[], int]) -> Rate:
    """Of `work`, which returns a number of rows, the second time it is done."""
    work()
    before, begun = storage.bytes, perf_counter()
    rows = work()
    seconds = perf_counter() - begun
    return Rate(rows / seconds, (storage.bytes - before) / seconds)


def _copy_speed() -> float:
    """Bytes a second that one thread copies from memory to memory, the median of five."""
    source = np.ones(_COPIED, np.uint8)
    target = np.zeros_like(source)
    found = []
    for _ in range(5):
        begun = perf_counter()
        np.copyto(target, source)
        found.append(_COPIED / (perf_counter() - begun))
    return float(np.median(found))


def _try_codecs(
    cache: Cache, name: str, output: OutputSpec, units: RowNumbers, rows: int, seed: int
) -> Iterator[CodecTrial]:
    limit = max(1, min(rows, _CODEC_ROWS, _CODEC_BYTES // (4 * math.prod(output.shape))))
    drawn = draw_rows(np.random.default_rng(seed), cache.plan, units, 2 * limit)
    usable = drawn[cache.valid(drawn, name)][:limit]
    if not len(usable):
        return
    teacher = cache.teachers[name]
    features, statistics = cache.read(name, output.name, usable), teacher.statistics[output.name]
    for codec in CODECS:
        of_fp16, squared, cosine = try_codec(features, codec, statistics, output)
        yield CodecTrial(
            teacher=name,
            output=output.name,
            codec=codec.name,
            step=codec.step,
            rows=len(usable),
            of_fp16=of_fp16,
            rmse=math.sqrt(squared.mean()),
            cosine=float(cosine.mean()),
            worst=math.sqrt(squared.max()),
            grid=teacher.spec.codec.step,
        )


def try_codec(
    features: npt.NDArray[np.float32], codec: CodecSpec, statistics: Statistics, output: OutputSpec
) -> tuple[float, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Encode float32 features [n, *output.shape] as one shard of a cache.

    Returns:
        Its size against fp16 of the same numbers; squared error float64 [n] in channel standard deviations; cosine
        float64 [n], the mean over tokens.
    """
    statistics = for_codec(statistics, codec)
    grid = make_grid(codec, statistics)
    rows = len(features)
    unit_rows = -(-rows // 64) * 64
    array = shard_layout(rows, unit_rows, "bench", "zarr", output, grid)
    stored = grid.encode(features)
    size = len(encode_shard(stored, array, 0).data)
    found = measure(features, grid.decode(stored), grid.saturated(features), statistics)
    return size / (2 * features.size), found.squared_error, found.cosine


def draw_rows(rng: np.random.Generator, plan: Plan, units: RowNumbers, wanted: int) -> RowNumbers:
    """`wanted` row numbers of `units` (int64 [n]) in random order, none twice; all of them where there are fewer.

    Memory grows with the number of units and of rows wanted, not with that of rows.
    """
    first = units * plan.unit_rows
    ends = np.cumsum(np.minimum(plan.rows - first, plan.unit_rows))
    places = rng.choice(ends[-1], min(wanted, int(ends[-1])), replace=False)
    unit = np.searchsorted(ends, places, side="right")
    rows: RowNumbers = first[unit] + places - np.concatenate([[0], ends])[unit]
    return rows
