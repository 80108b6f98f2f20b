"""How many rows calibration needs: what statistics of few rows cost, on CIFAR-10 with real teachers.

    python benchmarks/calibration.py resnet56                 # 32 pixels; 64 channels
    python benchmarks/calibration.py lite0 --pool 12800       # EfficientNet-Lite0 at 128 pixels; 1,280 channels

The first 64, 128, ... of `--pool` training images, drawn at random, give the statistics; everything is measured on
`--judged` others. `mean` and `std` are how far the mean and the standard deviation of a channel are from those of all
images together, in its standard deviations: root mean square over channels, and the largest. RMSE is that of stored
features, in the same standard deviations; size is against fp16.
"""

import copy
import io
from collections.abc import Iterator
from typing import Annotated, Any, Final

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from PIL import Image
from real_data import DATA, REPOSITORY, RESNET

from kpu.format.codecs import calibrated, make_grid
from kpu.format.fidelity import measure
from kpu.format.statistics import F32, Accumulator, Statistics
from kpu.format.teacher import CodecSpec
from kpu.pixels.resize import geometry, resize_image
from kpu.shards.chunk import encode_chunk, use_one_thread
from pipeline.sections import TeacherConfig
from pipeline.teachers import FrozenTeacher, build_teacher
from pipeline.worker.moments import moments

BATCH: Final = 64  # also the vectors of a chunk
TEACHERS: Final[dict[str, dict[str, Any]]] = {
    "resnet56": {
        "model": f"torch:{REPOSITORY}/{RESNET}:resnet56",
        "weights": str(DATA / "teachers/cifar_resnet/resnet56-4bfd9763.th"),
    },
    "lite0": {
        "model": "timm:tf_efficientnet_lite0",
        "weights": str(DATA / "teachers/efficientnet_lite/tf_efficientnet_lite0.safetensors"),
        "input": {"size": 128},
    },
}


def pixels(teacher: FrozenTeacher, rows: int) -> Iterator[torch.Tensor]:
    """uint8 batches [64, H, W, 3] of CIFAR training images in random order."""
    files = sorted((DATA / "data/cifar10").glob("train-*.parquet"))
    encoded = [image["bytes"] for file in files for image in pq.read_table(file)["image"].to_pylist()]
    order = np.random.default_rng(0).permutation(len(encoded))[:rows]
    shape = geometry(teacher.input)
    for start in range(0, rows, BATCH):
        images = (Image.open(io.BytesIO(encoded[row])).convert("RGB") for row in order[start : start + BATCH])
        yield torch.from_numpy(np.stack([resize_image(image, shape) for image in images]))


def stored(features: F32, statistics: Statistics, codec: CodecSpec, true: Statistics) -> tuple[float, float]:
    """Bytes of `features` against fp16, and the RMSE of what is read back, in `true` standard deviations."""
    grid = make_grid(codec, statistics)
    values = grid.encode(features)
    chunks = np.split(values, len(values) // (BATCH if features.ndim == 2 else 1))
    size = sum(len(encode_chunk(np.ascontiguousarray(chunk), grid.packing)) for chunk in chunks)
    rows = measure(features, grid.decode(values), np.zeros(features.shape, np.bool_), true)
    return size / features.size / 2, float(np.sqrt(rows.squared_error.mean()))


def report(name: str, features: F32, prefixes: dict[int, Accumulator], together: Accumulator) -> None:
    """Print the lines of one output; `prefixes` are moments by number of rows."""
    codecs = (CodecSpec(), CodecSpec(name="rotated"))
    true = together.finish(0.05)
    for rows, accumulator in prefixes.items():
        found = accumulator.finish(0.05)
        mean = np.abs(found.mean - true.mean) / true.std
        std = np.abs(found.std / true.std - 1)
        errors = [
            f"{kind} {(each**2).mean() ** 0.5:.4f}, {each.max():.3f}" for kind, each in (("mean", mean), ("std", std))
        ]
        for codec in codecs:
            size, rmse = stored(features, calibrated(accumulator, codec), codec, true)
            errors.append(f"{codec.name} {size:.3f} at {rmse:.4f}")
        print(f"{name}, {rows:,} rows: {'; '.join(errors)}", flush=True)


def main(
    teacher: Annotated[str, typer.Argument(help="resnet56 or lite0.")],
    pool: Annotated[int, typer.Option(help="Images that statistics are taken from.")] = 12800,
    judged: Annotated[int, typer.Option(help="Other images, that features are measured on.")] = 2048,
) -> None:
    """Print a line for each output and number of rows."""
    use_one_thread()
    model = build_teacher(teacher, TeacherConfig.model_validate(TEACHERS[teacher]))
    running = {output.name: Accumulator(output.channels) for output in model.outputs}
    prefixes: dict[str, dict[int, Accumulator]] = {name: {} for name in running}
    held: dict[str, list[F32]] = {name: [] for name in running}
    marks = [64 * 2**power for power in range(16) if 64 * 2**power < pool] + [pool]
    for number, batch in enumerate(pixels(model, pool + judged)):
        done = (number + 1) * BATCH
        for name, features in model(batch).items():
            running[name].add(*moments(features))
            if done in marks:
                prefixes[name][done] = copy.deepcopy(running[name])
            if done > pool:
                held[name].append(features.numpy())
    for name, accumulators in prefixes.items():
        report(f"{teacher} {name}", np.concatenate(held[name]), accumulators, running[name])


if __name__ == "__main__":
    typer.run(main)
