"""Finding the units that `retry-failed` is to try again, and how they were tried before."""

from collections import defaultdict

from cache.locations import open_storage
from cache.runs import RunRecord, load_runs
from cache.status import status


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
