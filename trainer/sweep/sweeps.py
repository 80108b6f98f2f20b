"""What a sweep file says: a configuration, what to vary in it, and the seeds to repeat each cell with."""

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from kpu.config.paths import anchor_paths
from kpu.config.settings import Section, check_command, read_yaml, section, setting, validate
from kpu.errors import ConfigError
from trainer.config import PATHS, TrainConfig, validate_config
from trainer.sections import Text

TRIAL_NAME: Final = re.compile(r"\d{3,}(-[\w.+-]+)?-seed\d+")
"""What the folder of a training is called: the number of its cell, what that sets, and the seed."""
_SLUG_LENGTH: Final = 60
_LISTS = "a mapping of keys of the configuration to lists of values"


class SweepConfig(Section):
    """A sweep file. Relative paths begin at its folder, those of another file that it names at that file's."""

    config: Text | dict[str, Any] = setting("the path of a configuration, or its keys")
    """What all trainings have in common."""
    grid: dict[Text, Annotated[list[Any], Field(min_length=1)]] = setting(_LISTS, default={})
    """Values by key of the configuration; the first cell is what others are compared with."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)] = setting(
        "a list of whole numbers from 0", default=[0, 1, 2]
    )
    """Each cell is trained with each."""
    out: Text = setting("a folder")
    """Where the trainings go, a folder each."""
    executor: Literal["ray", "inline"] = setting("ray or inline", default="ray")
    """By Ray Tune, or one after the other."""


@dataclass(frozen=True)
class SweepTrial:
    """One training of a sweep: its cell, its seed, its configuration and the name of its folder."""

    cell: int
    seed: int
    config: TrainConfig
    name: str


@dataclass(frozen=True)
class Sweep:
    """All trainings of a sweep. `cells` are what each sets, by key; the first is what others are compared with."""

    out: Path
    executor: str
    cells: tuple[dict[str, Any], ...]
    seeds: tuple[int, ...]
    trials: tuple[SweepTrial, ...]


def load_sweep(file: Path, out: Path | None = None) -> Sweep:
    """Read a sweep file and check the configuration of every training. `out` replaces the file's.

    Raises:
        ConfigError: a key is unknown, a value is wrong in some cell, or two cells or seeds are the same.
    """
    values = read_yaml(file)
    check_command(values, file, "kpu-train ablate")
    anchor_paths(values, file, ("config", "out", *(f"config.{key}" for key in PATHS)))
    if out is not None:
        values["out"] = str(out)
    sweep = validate(SweepConfig, values, str(file))
    base = sweep.config
    if isinstance(base, str):
        common = Path(base)
        base = read_yaml(common)
        anchor_paths(base, common, PATHS)
    if "seed" in sweep.grid:
        raise ConfigError(f"{file}: grid: expected keys other than seed, found it; give a list of seeds as seeds")
    cells = tuple(dict(zip(sweep.grid, chosen, strict=True)) for chosen in itertools.product(*sweep.grid.values()))
    _distinct([name_of(cell) for cell in cells], f"{file}: grid")
    _distinct([str(seed) for seed in sweep.seeds], f"{file}: seeds")
    trials, place = [], Path(sweep.out).absolute()
    for number, cell in enumerate(cells):
        for seed in sweep.seeds:
            name = _folder_of(place, number, cell, seed)
            config = validate_config(_laid_over(base, {**cell, "seed": seed}), f"{file}: {name_of(cell)}")
            trials.append(SweepTrial(number, seed, config, name))
    return Sweep(place, sweep.executor, cells, tuple(sweep.seeds), tuple(trials))


def name_of(cell: Mapping[str, Any]) -> str:
    """What a table calls a cell: its values by key."""
    return ", ".join(f"{key}={_short(value)}" for key, value in cell.items()) or "the configuration as it is"


def _folder_of(out: Path, number: int, cell: Mapping[str, Any], seed: int) -> str:
    """`003-merge-add-lr-0.008-seed0`, or the folder that this number and seed have already: `003-seed0` once."""
    words = "-".join(f"{key.rpartition('.')[2]}-{_short(value)}" for key, value in cell.items())
    slug = re.sub(r"[^\w.+]+", "-", words, flags=re.ASCII)[:_SLUG_LENGTH].strip("-.")
    begun = [path.name for path in out.glob(f"{number:03d}-*") if TRIAL_NAME.fullmatch(path.name)]
    own = [name for name in begun if name.endswith(f"-seed{seed}")]
    return min(own, default="-".join(part for part in (f"{number:03d}", slug, f"seed{seed}") if part))


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _laid_over(base: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of a cell; a key may go down into sections, with dots."""
    values = copy.deepcopy(dict(base))
    for key, value in cell.items():
        *parents, leaf = key.split(".")
        section(values, parents)[leaf] = value
    return values


def _distinct(names: Sequence[str], where: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{where}: expected each once, found {twice[0]!r} again; remove one")
