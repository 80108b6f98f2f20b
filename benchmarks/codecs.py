"""Size, error and speed of ways to store features: the project's codecs, candidates for a better one, and peers.

    python benchmarks/codecs.py my.kpu --teacher dino --output patch     # a cache of codec fp32
    python benchmarks/codecs.py features.npy                             # float32 [rows, D] or [rows, tokens, D]
    python benchmarks/codecs.py my.kpu --teacher dino --rmse 0.0145 --rmse 0.06     # sizes at these errors, and no more

Statistics come from the even rows and everything is measured on the odd ones, so that nothing is fitted to what it is
judged by. A chunk is what a cache has: one row of a map, 64 rows of vectors, with a checksum. Speed is that of turning
a stored array into the bytes of a chunk and back on one thread, without quantisation and affine map, which run on the
device. The variants take turns; the figure is the median over rounds against the default codec.

- `rotated, product on the CPU`: with the product that turns what is stored back, which else runs on the device.
- `signed, bit planes`: the integers of `uniform` as steps from the mean, bits shuffled, in small blocks to zstd 2.
- `int8 per token`, `fp8`, `ZFP` are given standardised features, which suits them better than raw ones; `PCodec` gets
  the integers of `uniform`, in chunks of the same rows. ZFP and PCodec need `pip install zfpy==1.0.1 pcodec`.
"""

import functools
import itertools
import math
import statistics as medians
from collections.abc import Iterator
from operator import truediv
from pathlib import Path
from time import process_time
from typing import Annotated, Final, Literal

import numpy as np
import torch
import typer
from codec_peers import VECTORS, Codec, Stored, chunks_of, peers
from numcodecs import blosc
from rich.console import Console
from rich.table import Table

from kpu.format.codecs import calibrated, make_grid
from kpu.format.commits import Fidelity
from kpu.format.fidelity import measure, summarise
from kpu.format.statistics import F32, Accumulator, Statistics, snap
from kpu.format.teacher import CodecSpec
from kpu.reading.cache import open_cache
from kpu.shards.chunk import crc, decode_chunk, encode_chunk, use_one_thread

STEPS: Final = (0.02, 0.05, 0.1, 0.2)
DEFAULT: Final = "uniform 0.05"


def project_codec(spec: CodecSpec, accumulator: Accumulator, *, turned: bool = False) -> Codec:
    """A codec of the project; `turned` has unpacking include the product that leads back from the axes."""
    grid = make_grid(spec, calibrated(accumulator, spec))
    name = spec.name if spec.step is None else f"{spec.name} {spec.step}"

    def unpack(raw: bytes, out: Stored) -> Stored:
        decode_chunk(raw, out, grid.packing)
        if turned:
            assert grid.axes is not None
            grid.steps(out).astype(np.float32) @ grid.axes
        return out

    pack = functools.partial(encode_chunk, packing=grid.packing)
    return Codec(f"{name}, product on the CPU" if turned else name, grid.encode, grid.decode, pack, unpack)


def project_codecs(accumulator: Accumulator) -> Iterator[Codec]:
    """What the project has."""
    stepped = [CodecSpec(name=name, step=step) for name in ("uniform", "rotated") for step in STEPS]
    for spec in (CodecSpec(name="fp16"), CodecSpec(name="bf16"), *stepped):
        yield project_codec(spec, accumulator)
    yield project_codec(CodecSpec(name="rotated", step=0.05), accumulator, turned=True)


def candidates(accumulator: Accumulator) -> Iterator[Codec]:
    """What else the same integers can become."""
    for step in STEPS:
        yield _signed(accumulator.finish(step), step)


def _signed(statistics: Statistics, step: float) -> Codec:
    centre, scale = snap(statistics.mean, statistics.std, step)

    def store(x: F32) -> Stored:
        return np.clip(np.rint((x - centre) / scale), -32767, 32767).astype(np.int16)

    def restore(stored: Stored) -> F32:
        return centre + scale * stored.astype(np.float32)

    def pack(chunk: Stored) -> bytes:
        data: bytes = blosc.compress(chunk, b"zstd", 2, blosc.BITSHUFFLE, 6144)
        return data + crc(data)

    return Codec(f"signed, bit planes {step}", store, restore, pack, _unshuffled)


def _unshuffled(raw: bytes, out: Stored) -> Stored:
    blosc.decompress(raw, out)
    return out


def load(path: Path, teacher: str, output: str, rows: int) -> F32:
    """float32 [n, D] or [n, T, D]: the first `rows` rows that are not masked.

    Raises:
        typer.BadParameter: features that are quantised already, of another shape, or too few.
    """
    if path.suffix == ".npy":
        features = np.load(path, mmap_mode="r")[:rows].astype(np.float32)
    else:
        cache = open_cache(path)
        codec = cache.read_encoded(teacher, output, slice(0, 1)).codec
        if codec != "fp32":
            raise typer.BadParameter(f"{path}, {teacher} {output}: expected codec fp32, found {codec}: extract it anew")
        features = cache.read(teacher, output, np.flatnonzero(cache.valid(slice(0, rows)))[:rows])
    if features.ndim not in (2, 3) or len(features) < 4 * VECTORS ** (3 - features.ndim):
        raise typer.BadParameter(f"{path}: expected [256 rows or more, D] or [4, T, D], found {features.shape}")
    return np.ascontiguousarray(features)


def judge(codec: Codec, features: F32, statistics: Statistics) -> tuple[float, Fidelity]:
    """Bytes against fp16, and what storing costs in precision."""
    chunks = chunks_of(codec.store(features))
    packed = [codec.pack(chunk) for chunk in chunks]
    unpacked = np.stack([_again(codec, raw, chunk) for raw, chunk in zip(packed, chunks, strict=True)])
    features = features[: len(chunks) * (1 if features.ndim == 3 else VECTORS)]
    decoded = codec.restore(unpacked).reshape(features.shape)
    rows = measure(features, decoded, np.zeros(features.shape, np.bool_), statistics)
    fidelity = summarise(rows, np.ones(len(features), np.bool_), 0)
    assert fidelity is not None
    return sum(map(len, packed)) / features.size / 2, fidelity


def size_at(
    name: Literal["uniform", "rotated"], rmse: float, accumulator: Accumulator, features: F32
) -> tuple[float, float]:
    """The step at which a codec has this error, found by bisection, and its bytes against fp16."""
    low, high = rmse, 16 * rmse
    while high / low > 1.01:
        step = math.sqrt(low * high)
        codec = project_codec(CodecSpec(name=name, step=step), accumulator)
        size, fidelity = judge(codec, features, accumulator.finish(step))
        low, high = (step, high) if fidelity.rmse < rmse else (low, step)
    return step, size


def race(codecs: list[Codec], features: F32, rounds: int) -> tuple[list[dict[str, float]], list[float]]:
    """Speed of packing and of unpacking relative to the default, and the default's in MB/s of fp16."""
    chunks = {codec.name: chunks_of(codec.store(features)) for codec in codecs}
    packing, unpacking = ({codec.name: list[float]() for codec in codecs} for _ in range(2))
    for _ in range(rounds):
        for codec in codecs:
            own, out = chunks[codec.name], np.empty_like(chunks[codec.name][0])
            begun = process_time()
            packed = [codec.pack(chunk) for chunk in own]
            between = process_time()
            for raw in packed:
                codec.unpack(raw, out)
            packing[codec.name].append(between - begun)
            unpacking[codec.name].append(process_time() - between)

    speeds = [
        {name: medians.median(map(truediv, seconds[DEFAULT], own)) for name, own in seconds.items()}
        for seconds in (packing, unpacking)
    ]
    megabytes = sum(chunk.size for chunk in chunks[DEFAULT]) * 2 / 1e6
    return speeds, [megabytes / medians.median(seconds[DEFAULT]) for seconds in (packing, unpacking)]


def _again(codec: Codec, raw: bytes, chunk: Stored) -> Stored:
    """A chunk unpacked into memory of its own."""
    return np.asarray(codec.unpack(raw, np.empty_like(chunk))).view(chunk.dtype).reshape(chunk.shape)


def main(
    path: Annotated[Path, typer.Argument(help="A cache of codec fp32, or a .npy of float32 features.")],
    teacher: Annotated[str, typer.Option(help="Of the cache.")] = "",
    output: Annotated[str, typer.Option(help="Of the teacher.")] = "patch",
    rows: Annotated[int, typer.Option(help="How many rows are read.")] = 512,
    rounds: Annotated[int, typer.Option(help="How often every codec packs and unpacks.")] = 5,
    rmse: Annotated[
        list[float] | None, typer.Option(help="Only sizes at this error, by the step that gives it.")
    ] = None,
) -> None:
    """Print the table of one output."""
    use_one_thread()
    torch.set_num_threads(1)
    features = load(path, teacher, output, rows)
    fitted, judged = features[0::2], np.ascontiguousarray(features[1::2])
    accumulator = Accumulator(features.shape[-1])
    accumulator.update(fitted.reshape(-1, features.shape[-1]))
    if rmse:
        for name, error in itertools.product(("uniform", "rotated"), rmse):
            step, size = size_at(name, error, accumulator, judged)
            print(f"{path.name} {teacher} {output}: {name} at RMSE {error}: {size:.3f} of fp16, step {step:.4f}")
        return
    statistics = accumulator.finish(0.05)
    codecs = [*project_codecs(accumulator), *candidates(accumulator), *peers(statistics)]
    (packing, unpacking), rates = race(codecs, judged, rounds)
    title = f"{path.name} {teacher} {output if teacher else ''} {judged.shape}, zeros {statistics.zeros:.2f}"
    table = Table(title=title, box=None, pad_edge=False)
    for column in ("codec", "of fp16", "RMSE", "cosine", "worst row", "encode", "decode"):
        table.add_column(column, justify="left" if column == "codec" else "right")
    for codec in codecs:
        size, fidelity = judge(codec, judged, statistics)
        figures = (f"{size:.3f}", f"{fidelity.rmse:.4f}", f"{fidelity.cosine:.5f}", f"{fidelity.worst_rmse:.4f}")
        table.add_row(codec.name, *figures, f"x{packing[codec.name]:.2f}", f"x{unpacking[codec.name]:.2f}")
    Console(width=140).print(table)
    print(f"{DEFAULT}: encodes {rates[0]:.0f} and decodes {rates[1]:.0f} MB/s of fp16 on one thread")


if __name__ == "__main__":
    typer.run(main)
