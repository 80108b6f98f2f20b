"""`kpu-cache extract` against a bare loop: the same images, teachers, batch size and threads, nothing written.

    python benchmarks/extract.py --case vit --minutes 4
    python benchmarks/extract.py --case cifar --executors inline ray
    python benchmarks/extract.py --case enlarged        # for a GPU: 10,000 small images for a ViT-S/14

Runs are interleaved (bare, inline, ray, bare, ...) until the time is up, so that a machine that drifts in speed drifts
for all of them; the figure is the median of the ratios within a round. Start-up (loading models, planning,
calibration) is left out of the rates and reported on its own. A GPU, if there is one, runs the teachers of both, in
bf16. Real images and CIFAR weights come from KPU_TEST_DATA (default ../shared, see CONTRIBUTING.md).
"""

import argparse
import io
import json
import os
import shutil
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from time import perf_counter
from typing import Any

import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from real_data import DATA, REPOSITORY, RESNET, cifar_teacher, cifar_weights
from timm.data import create_transform, resolve_model_data_config

from pipeline.config import validate_config
from pipeline.extract import extract
from pipeline.worker.device import choose_device

CIFAR = {"general": "resnet56", "animals": "resnet20", "vehicles": "resnet20"}


@dataclass(frozen=True)
class Case:
    """What is extracted, and the same for the bare loop: encoded images and (transform, features) of each teacher."""

    config: dict[str, Any]
    images: Callable[[], list[bytes]]
    teachers: Callable[[], list[tuple[Callable[[Image.Image], torch.Tensor], Callable[[torch.Tensor], Any]]]]


def imagenet_images() -> list[bytes]:
    images = []
    for path in sorted((DATA / "data/imagenet-sample").glob("*.tar")):
        with tarfile.open(path) as tar:
            images += [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]  # type: ignore[union-attr]
    return images


def cifar_images() -> list[bytes]:
    table = pq.read_table(CIFAR_TEST, columns=["image"])
    return [row["bytes"] for row in table["image"].to_pylist()]


TIMM = {"dino": "vit_small_patch14_dinov2", "clip": "vit_base_patch16_clip_224", "convnext": "convnext_tiny"}


def timm_teachers(names: tuple[str, ...]) -> list[Any]:
    def load(name: str) -> tuple[Any, Any]:
        size = {"img_size": 224} if name.startswith("vit_small_patch14") else {}
        model = timm.create_model(name, pretrained=False, **size).eval().to(choose_device())
        own = resolve_model_data_config(model) | {"input_size": (3, 224, 224)}
        transform = create_transform(**own, is_training=False)

        def features(x: torch.Tensor) -> Any:
            tokens = model.forward_features(x)
            return tokens, model.forward_head(tokens, pre_logits=True)

        return transform, features

    return [load(name) for name in names]


def load_source(path: Path) -> Any:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cifar_teachers() -> list[Any]:
    cifar_resnet = load_source(REPOSITORY / RESNET)

    def load(name: str, factory: str) -> tuple[Any, Any]:
        weights = torch.load(cifar_weights(name), weights_only=True)
        module = getattr(cifar_resnet, factory)(state_dict=weights)
        module.load_state_dict(weights)
        own = module.data_config
        transform = create_transform(
            own["input_size"], is_training=False, mean=own["mean"], std=own["std"], crop_pct=own["crop_pct"],
            interpolation=own["interpolation"],
        )  # fmt: skip
        return transform, module.eval().to(choose_device())

    return [load(name, factory) for name, factory in CIFAR.items()]


IMAGENET = str(DATA / "data/imagenet-sample/*.tar")
CIFAR_TEST = str(DATA / "data/cifar10/test-00000-of-00001.parquet")


def timm_case(*names: str, source: str = IMAGENET, images: Callable[[], list[bytes]] = imagenet_images) -> Case:
    return Case(
        {
            "data": {"source": source},
            "teachers": {
                name: {"model": f"timm:{TIMM[name]}", "weights": "random", "input": {"size": 224}} for name in names
            },
            "calibration_rows": 64,
        },
        images,
        lambda: timm_teachers(tuple(TIMM[name] for name in names)),
    )


CASES = {
    "vit": timm_case("dino"),
    "three": timm_case("dino", "clip", "convnext"),
    "enlarged": timm_case("dino", source=CIFAR_TEST, images=cifar_images),
    "cifar": Case(
        {
            "data": {"source": CIFAR_TEST},
            "teachers": {name: cifar_teacher(factory, name) for name, factory in CIFAR.items()},
        },
        cifar_images,
        cifar_teachers,
    ),
}


def bare_loop(case: Case, batch_size: int, threads: int) -> float:
    """Decode and run, in rows/s; the models are loaded and have seen one batch before the clock starts."""
    torch.set_num_threads(threads)
    images, teachers, device = case.images(), case.teachers(), torch.device(choose_device())
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def decode(data: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [transform(image) for transform, _ in teachers]

    def run(batch: list[bytes], pool: ThreadPoolExecutor) -> None:
        rows = list(pool.map(decode, batch))
        for index, (_, features) in enumerate(teachers):
            features(torch.stack([row[index] for row in rows]).to(device))

    with ThreadPoolExecutor(threads) as pool, torch.inference_mode(), bf16:
        run(images[:batch_size], pool)
        start = perf_counter()
        for at in range(0, len(images), batch_size):
            run(images[at : at + batch_size], pool)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return len(images) / (perf_counter() - start)


def extraction(case: Case, executor: str, batch_size: int, threads: int, folder: Path) -> tuple[float, dict[str, Any]]:
    """`extract` into a new cache, in rows/s, and the run's own record."""
    out = folder / "bench.kpu"
    shutil.rmtree(out, ignore_errors=True)
    settings = {"kind": executor, "batch_size": batch_size, "threads": threads, "workers": 1}
    summary = extract(validate_config({**case.config, "out": str(out), "executor": settings}, "benchmark"))
    if not summary.complete:
        raise SystemExit(f"the extraction did not complete: {summary.failures}")
    record = json.loads((out / "runs" / f"{summary.id}.json").read_text())
    shutil.rmtree(out)
    return summary.rows_per_second, record


def rounds(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, float]]:
    """One round: the bare loop and each executor once."""
    case, start = CASES[arguments.case], perf_counter()
    while perf_counter() - start < 60 * arguments.minutes:
        rates = {"bare": bare_loop(case, arguments.batch_size, arguments.threads)}
        for executor in arguments.executors:
            rates[executor], record = extraction(case, executor, arguments.batch_size, arguments.threads, folder)
            print(f"  {executor}: start-up {record['startup_seconds']} s, busy {record['stage_seconds']} s", flush=True)
        print("  " + ", ".join(f"{name} {rate:.1f} rows/s" for name, rate in rates.items()), flush=True)
        yield rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="vit")
    parser.add_argument("--executors", nargs="+", choices=["inline", "ray"], default=["inline"])
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kpu-bench-") as folder:
        measured = list(rounds(arguments, Path(folder)))
    print(f"case {arguments.case}, {len(measured)} rounds, batch {arguments.batch_size}, {arguments.threads} threads")
    for name in measured[0]:
        ratios = sorted(rates[name] / rates["bare"] for rates in measured)
        rate = statistics.median(rates[name] for rates in measured)
        print(
            f"{name:>8}: {rate:9.1f} rows/s, {statistics.median(ratios):.3f} of bare "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )
    if {"inline", "ray"} <= set(measured[0]):
        print(f"ray of inline: {statistics.median(r['ray'] / r['inline'] for r in measured):.3f}")


if __name__ == "__main__":
    main()
