"""Caches of real images that `train.py` and `students.py` learn from; the weights of the ViTs are random."""

from pathlib import Path
from typing import Any, Final

from real_data import DATA, cifar_teacher

TEACHERS: Final = {"dino": "vit_small_patch16_dinov3", "sup": "vit_small_patch16_224", "deit": "deit_small_patch16_224"}
SIDE: Final = {"kind": "side", "layers": ["layer1.patch", "layer2.patch"]}
LOSSLESS: Final = "fp32"
CODECS: Final[dict[str, dict[str, Any]]] = {
    LOSSLESS: {"name": "fp32"},
    "fp16": {"name": "fp16"},
    "bf16": {"name": "bf16"},
    **{f"uniform {step}": {"name": "uniform", "step": step} for step in (0.05, 0.1, 0.2, 0.3)},
    **{f"rotated {step}": {"name": "rotated", "step": step} for step in (0.05, 0.2)},
}


def extract_vits(folder: Path) -> Path:
    """Three ViT-S teachers, all outputs, on the sample of ImageNet."""
    from pipeline.config import validate_config
    from pipeline.extract import extract

    teachers = {name: {"model": f"timm:{model}", "weights": "random"} for name, model in TEACHERS.items()}
    source = {"source": str(DATA / "data/imagenet-sample/*.tar")}
    out = folder / "cache.kpu"
    extract(validate_config({"data": source, "out": str(out), "teachers": teachers}, "benchmark"))
    return out


def extract_cifar(folder: Path, split: str, rows: int, codec: str, same: Path | None = None) -> Path:
    """The three CIFAR teachers on so many images of a split, by a name of CODECS."""
    from pipeline.config import validate_config
    from pipeline.extract import extract

    out = folder / f"cifar-{split}-{rows}-{codec.replace(' ', '-')}.kpu"
    config = {
        "data": {"source": str(DATA / f"data/cifar10/{split}-*.parquet"), "limit": rows},
        "out": str(out),
        "codec": CODECS[codec],
        "calibration_from": str(same) if same else None,
        "teachers": {
            "general": cifar_teacher("resnet56", "general", layers=["layer1", "layer2"]),
            "animals": cifar_teacher("resnet20", "animals"),
            "vehicles": cifar_teacher("resnet20", "vehicles"),
        },
    }
    extract(validate_config(config, "benchmark"))
    return out
