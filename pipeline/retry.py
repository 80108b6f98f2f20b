"""Finding the units that `retry-failed` is to try again, and the configuration to try them with.

A record of a run is not sealed: whoever passes a cache on can write anything there. So it says which units failed, for
which teachers, and a few numbers. Teachers come from their own sealed records, rows from the plan.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kpu.config.settings import validate
from kpu.errors import ConfigError
from kpu.format.plan import CropSpec
from kpu.reading.cache import Cache, open_cache
from kpu.records.runs import RunRecord, load_runs
from kpu.storage.open import open_storage
from kpu.tools.status import status
from pipeline.config import ExtractConfig
from pipeline.paths import absolute
from pipeline.recorded import planned_data, teacher_config
from pipeline.sections import ExecutorConfig

_LARGEST_BATCH: Final = 2**16


def failed_runs(path: str) -> list[tuple[RunRecord, frozenset[int]]]:
    """Runs, the oldest first, each with the units that failed in it, in no later run, and are not committed since.

    Raises:
        NotACacheError: there is no cache at `path`.
    """
    failed = status(path).failed
    runs = {run.id: run for run in load_runs(open_storage(path))}  # later: every failure that was found is in them
    latest = {(failure.teacher, failure.unit): run.id for run in runs.values() for failure in run.failed}
    units: defaultdict[str, set[int]] = defaultdict(set)
    for failure in failed:
        units[latest[failure.teacher, failure.unit]].add(failure.unit)
    return [(run, frozenset(units[name])) for name, run in runs.items() if name in units]


def retry_configs(path: str, run: RunRecord) -> list[ExtractConfig]:
    """How to try a run's failed units again, one configuration for each format of its teachers' shards.

    Of the record, only the names of the teachers, the batch size, whether NaN masks a row and whether models are
    compiled are taken; and where the images are, if they are no longer where the plan says and the listing is the same.

    Raises:
        ConfigError: a unit failed for a teacher that the cache lacks, or the plan names a place that only the user may.
    """
    cache = open_cache(path)
    failed = {failure.teacher for failure in run.failed if failure.teacher is not None}
    if lacking := sorted(failed - cache.teachers.keys()):
        raise ConfigError(
            f"{path}/runs/{run.id}.json: expected failures of teachers that the cache has, found {lacking[0]!r}; give "
            "its configuration with -c, or run `kpu-cache extract` again"
        )
    names = [name for name in cache.teachers if name in {*failed, *run.teachers}] or list(cache.teachers)
    formats = dict.fromkeys(cache.teachers[name].spec.format for name in names)
    by_format = {each: [name for name in names if cache.teachers[name].spec.format == each] for each in formats}
    return [_config(cache, path, run, chosen).model_copy(update={"format": each}) for each, chosen in by_format.items()]


def with_executor(config: ExtractConfig, kind: str | None, address: str | None) -> ExtractConfig:
    """The configuration with the executor that the user chose.

    Raises:
        ConfigError: there is no such executor, or an address without Ray.
    """
    given = {"kind": kind, "address": address}
    chosen = {key: value for key, value in given.items() if value is not None}
    values = {**config.executor.model_dump(), **chosen}
    executor = validate(ExecutorConfig, values, "--executor", {})
    if executor.address is not None and executor.kind != "ray":
        raise ConfigError(f"--ray-address {address}: expected with --executor ray, found {executor.kind}; add it")
    return config.model_copy(update={"executor": executor})


def _config(cache: Cache, path: str, run: RunRecord, names: Sequence[str]) -> ExtractConfig:
    plan, teachers = cache.plan, {}
    for name in names:
        compiled = _section(run.config, "teachers", name).get("compile") is True
        teachers[name] = teacher_config(cache.teachers[name].spec).model_copy(update={"compile": compiled})
    size = _section(run.config, "executor").get("batch_size")
    valid = isinstance(size, int) and not isinstance(size, bool) and 0 < size <= _LARGEST_BATCH
    return ExtractConfig(
        data=planned_data(plan.source, plan.samples, _section(run.config, "data")),
        out=absolute(path),
        views=plan.views,
        crop=plan.crop or CropSpec(),
        seed=plan.seed,
        allow_nonfinite=run.config.get("allow_nonfinite") is True,
        teachers=teachers,
        executor=ExecutorConfig.model_validate({"batch_size": size} if valid else {}),
    )


def _section(values: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """A section of plain values; empty if there is none."""
    for key in path:
        found = values.get(key)
        if not isinstance(found, dict):
            return {}
        values = found
    return values
