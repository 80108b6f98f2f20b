"""The cells of `inheritance.py`: which configurations are compared, with what, and on how many seeds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

BASE: Final = "general"
SPECIALISTS: Final = ("animals", "vehicles")
ALL: Final = (BASE, *SPECIALISTS)
EXAMPLES: Final = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Cell:
    """Configuration keys laid over the tier's own, and the cells it is compared with, on the same seeds."""

    keys: Mapping[str, Any] = field(default_factory=dict)
    against: tuple[str, ...] = ()
    seeds: int = 10


@dataclass(frozen=True)
class Tier:
    """Cells by name over common configuration keys; `processes` train at once."""

    common: Mapping[str, Any]
    cells: Mapping[str, Cell]
    processes: int


REFERENCE: Final = "standardize"
PLACEBO: Final = "t2s untrained"


def _tier_a() -> Tier:
    """Global targets only."""
    over, placebo = (REFERENCE,), (REFERENCE, PLACEBO)
    cells = {
        REFERENCE: Cell(),
        "frozen base": Cell({"student.kind": "frozen"}, over),
        **{f"solo {name}": Cell({"teachers": sorted({BASE, name})}, over) for name in SPECIALISTS},
        **_normalisations(),
        PLACEBO: Cell({"unify.mode": "untrained"}, over),
        "t2s pretrained": Cell({"unify.mode": "pretrained"}, placebo),
        "t2s joint": Cell({"unify.mode": "joint"}, placebo),
        "t2s pca": Cell({"unify.mode": "pca"}, placebo),
        "preserve": Cell({"preserve.weight": 1.0}, over),
        "concat": Cell({"student.merge": "concat"}, over),
        "dropping": Cell({"balance.name": "dropping"}, over),
    }
    for mode in ("untrained", "pretrained", "joint"):
        against = ("concat",) if mode == "untrained" else ("concat", "concat, t2s untrained")
        cells[f"concat, t2s {mode}"] = Cell({"student.merge": "concat", "unify.mode": mode}, against)
    for weight in (0.1, 1.0):
        keys = {"unify.mode": "pretrained", "unify.weight": weight}
        cells[f"t2s pretrained, lu {weight}"] = Cell(keys, ("t2s pretrained",), seeds=3)
    cells |= _competitions()
    common = {
        "outputs": ["global"],
        "student.merge": "add",
        "student.width": 64,
        "student.depth": 2,
        "projector.hidden": 128,
        "batch_size": 1024,
        "optim.epochs": 5,
        "threads": 1,
    }
    return Tier(common, cells, processes=2)


def _normalisations() -> dict[str, Cell]:
    """Normalisation and loss, with one teacher as it is and scaled; under raw alone the scale should matter."""
    losses = {"pair": {}, "mse": {"loss.cosine": 0.0, "loss.smooth_l1": 0.0, "loss.mse": 1.0}}
    cells: dict[str, Cell] = {}
    for suffix, said in (("", ""), ("_x10", ", vehicles x10"), ("_by10", ", vehicles /10")):
        teachers = {"teachers": [BASE, "animals", f"vehicles{suffix}"]}
        for normalize in ("raw", "standardize", "phi-s"):
            for loss, keys in losses.items():
                plain = REFERENCE if (normalize, loss) == ("standardize", "pair") else f"{normalize}, {loss}"
                if said or plain != REFERENCE:
                    seeds = 3 if said and normalize != "raw" else 10
                    chosen = {**teachers, "targets.normalize": normalize, **keys}
                    cells[f"{normalize}, {loss}{said}"] = Cell(chosen, (plain if said else REFERENCE,), seeds)
    return cells


def _competitions() -> dict[str, Cell]:
    """Where teachers compete: a narrow student, and a teacher that is ten times as loud."""
    narrow = {"student.width": 16}
    loud = {"teachers": [BASE, "animals", "vehicles_x10"], "targets.normalize": "raw"}
    return {
        "width 16": Cell(narrow, (REFERENCE,)),
        "width 16, t2s untrained": Cell({**narrow, "unify.mode": "untrained"}, ("width 16",)),
        "width 16, t2s pretrained": Cell(
            {**narrow, "unify.mode": "pretrained"}, ("width 16", "width 16, t2s untrained")
        ),
        "raw, vehicles x10, t2s pretrained": Cell({**loud, "unify.mode": "pretrained"}, ("raw, pair, vehicles x10",)),
    }


def _tier_b() -> Tier:
    """Side students with patch targets."""
    over = (REFERENCE,)
    cells = {
        REFERENCE: Cell(seeds=3),
        "preserve": Cell({"preserve.weight": 1.0}, over, 3),
        "concat": Cell({"student.merge": "concat"}, over, 3),
        "concat, 8 epochs": Cell({"student.merge": "concat", "optim.epochs": 8}, seeds=3),
        PLACEBO: Cell({"unify.mode": "untrained"}, over, 3),
        "t2s pretrained": Cell({"unify.mode": "pretrained"}, (REFERENCE, PLACEBO), 3),
        "concat, t2s untrained": Cell({"student.merge": "concat", "unify.mode": "untrained"}, ("concat",), 3),
        "concat, t2s pretrained": Cell(
            {"student.merge": "concat", "unify.mode": "pretrained"}, ("concat", "concat, t2s untrained"), 3
        ),
    }
    common = {
        "outputs": ["global", "patch"],
        "student.merge": "add",
        "student.layers": ["layer1.patch", "layer2.patch"],
        "batch_size": 256,
        "optim.epochs": 4,
    }
    return Tier(common, cells, processes=1)


def _tier_c() -> Tier:
    """Students of ResNet-20 size, from images."""
    common = {
        "outputs": ["global", "patch"],
        "student.kind": "full",
        "student.model": f"torch:{EXAMPLES}/cifar_resnet.py:resnet20",
        "student.weights": "random",
        "batch_size": 256,
        "optim.epochs": 6,
    }
    return Tier(common, {REFERENCE: Cell(seeds=3)}, processes=1)


TIERS: Final = {"A": _tier_a, "B": _tier_b, "C": _tier_c}
