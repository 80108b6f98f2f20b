"""Where the real images and teachers of the benchmarks are: KPU_TEST_DATA (default ../shared, see CONTRIBUTING.md)."""

import os
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).parents[1]
DATA: Final = Path(os.environ.get("KPU_TEST_DATA", REPOSITORY.parent / "shared")).resolve()
RESNET: Final = "examples/cifar_resnet.py"


def cifar_weights(name: str) -> Path:
    """The weights file of a CIFAR teacher: `general`, `animals` or `vehicles`."""
    return DATA / f"teachers/cifar_kpu/{name}.pt"


def cifar_teacher(factory: str, weights: str, file: str = RESNET, **more: Any) -> dict[str, Any]:
    """What a configuration says of a CIFAR teacher; `more` are further keys of it."""
    return {"model": f"torch:{REPOSITORY}/{file}:{factory}", "weights": str(cifar_weights(weights)), **more}
