"""What the figures of runs are of, and so which of them compare."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kpu.util.digests import digest_of
from trainer.config import TrainConfig
from trainer.evaluation.measured import compared_part
from trainer.run.runs import RunFolder


@dataclass(frozen=True)
class Origin:
    """Of one run: `plans` are the digests of its caches' plans, `models` those of its teachers, by name.

    `measured` tells the rows that were measured, which are `rows` of the caches `where`, from others.
    """

    name: str
    base: str
    caches: tuple[str, ...]
    plans: tuple[str, ...]
    models: dict[str, str]
    said: dict[str, str]
    measured: str
    rows: int
    where: tuple[str, ...]

    @staticmethod
    def of(name: str, run: RunFolder, config: TrainConfig, scores: Mapping[str, Any] | None, rows: int) -> "Origin":
        """Where `run` comes from. `scores` are those on other caches than its own, if so; `rows` were measured.

        Raises:
            CorruptError: what the run keeps of its caches is damaged.
        """
        specs, plans = run.specs(), tuple(each["plan"] for each in run.caches())
        models = {teacher: digest_of(compared_part(spec)) for teacher, spec in specs.items()}
        said = {n: f"{spec.model} (weights {spec.weights_digest[:8]}, {spec.precision})" for n, spec in specs.items()}
        own = scores is None
        measured = digest_of([rows, *([plans, config.validation] if own else [])])
        where = config.caches if scores is None else tuple(scores["caches"])
        return Origin(name, config.base, config.caches, plans, models, said, measured, rows, where)


def differences(origins: Sequence[Origin]) -> dict[str, list[str]]:
    """What sets apart the runs of one table, each with the names of the runs that it is about."""
    found: dict[str, list[str]] = {}

    def hold(runs: Sequence[Origin], key: Callable[[Origin], str], say: Callable[[Origin], str], what: str) -> None:
        groups: dict[str, list[Origin]] = {}
        for run in runs:
            groups.setdefault(key(run), []).append(run)
        if len(groups) > 1:
            parts = "; ".join(f"{', '.join(r.name for r in group)}: {say(group[0])}" for group in groups.values())
            found[what.format(parts)] = [run.name for run in runs]

    hold(
        origins,
        lambda run: run.measured,
        lambda run: f"{run.rows:,} rows of {', '.join(run.where)}",
        "measured on other rows ({}): R2, probes and ranks do not compare",
    )
    hold(
        origins,
        lambda run: digest_of(run.plans),
        lambda run: ", ".join(run.caches),
        "learned from other caches ({})",
    )
    hold(origins, lambda run: run.base, lambda run: run.base, "another base ({}): what is left of it does not compare")
    for teacher in dict.fromkeys(name for run in origins for name in run.models):
        hold(
            [run for run in origins if teacher in run.models],
            lambda run: run.models[teacher],  # noqa: B023
            lambda run: run.said[teacher],  # noqa: B023
            f"{teacher} is another model ({{}}): its R2 does not compare",
        )
    return found
