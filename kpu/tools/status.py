"""How far an extraction is: from listings, commit records and what runs left behind; features are never read."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
from pydantic_core import from_json

from kpu.errors import CorruptError
from kpu.format.plan import Plan
from kpu.format.reasons import reason
from kpu.records.images import load_status
from kpu.records.leftout import LeftOut
from kpu.records.plan import load_plan, not_a_cache
from kpu.records.runs import RecordedFailure, RunRecord, load_runs
from kpu.records.samples import Samples
from kpu.records.teachers import TeacherManifest, read_teacher, teacher_folders, teacher_names
from kpu.records.units import Mask, committed_units, count_rows, lost_images, unpack_mask
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.storage.open import open_storage

T = TypeVar("T")

_LARGEST: Final = 2**63
_REMOTE_READS: Final = 32  # at once: each waits for the network


@dataclass
class TeacherStatus:
    """How far one teacher is, and what storing its features cost.

    `bytes` of its committed shards; `rmse` in channel standard deviations over all values, `cosine` the mean over all
    tokens, of every output and valid row together; None if nothing is committed. `saturated` values are stored as
    the nearest that their codec can hold.
    """

    committed_units: int
    units: int
    committed_rows: int = 0
    bytes: int = 0
    rmse: float | None = None
    cosine: float | None = None
    saturated: int = 0


@dataclass(frozen=True)
class MaskedRow:
    """A row without features: in no teacher, or not in the one that `reason` names."""

    key: str
    row: int
    reason: str


@dataclass
class Status:
    """`complete` says that every unit is committed of every teacher that was begun or that the last run was to do.

    `masked_reasons` counts `masked` by their reasons, the most frequent first.

    `lost_images` are units that a teacher has committed and whose images are not: `kpu-cache repair` mends that.
    `left_out` is what the last run that listed the source passed over.
    """

    complete: bool
    rows: int
    units: int
    teachers: dict[str, TeacherStatus]
    masked: list[MaskedRow] = field(default_factory=list)
    failed: list[RecordedFailure] = field(default_factory=list)
    lost_images: list[int] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    masked_reasons: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def status(path: str | os.PathLike[str]) -> Status:
    """Look at a cache, finished or not, that others may be writing at this moment.

    Raises:
        NotACacheError: there is none, or one of another format version.
        CorruptError: a file that had to be read is damaged; `kpu-cache verify` lists all such files.
    """
    storage = open_storage(path)
    plan = load_plan(storage)
    runs = load_runs(storage)
    if plan is None:
        if not runs and storage.size(paths.ROOT) is None:
            raise not_a_cache(storage.url)
        return Status(complete=False, rows=0, units=0, teachers={})
    tallies = {name: _tally(storage, plan, read_teacher(storage, name)) for name in teacher_names(storage)}
    teachers = {name: tally.status() for name, tally in tallies.items()}
    begun = [*teacher_folders(storage), *(runs[-1].teachers if runs else ())]
    teachers |= {name: TeacherStatus(0, plan.units) for name in begun if name not in teachers}
    committed = {name: tally.committed for name, tally in tallies.items()}
    lost = sorted(lost_images(storage, plan, committed))
    all_done = bool(teachers) and all(teacher.committed_units == plan.units for teacher in teachers.values())
    masked = list(_masked_rows(storage, plan, tallies))
    return Status(
        complete=all_done and not lost,
        rows=plan.rows,
        units=plan.units,
        teachers=teachers,
        masked=masked,
        failed=_failed(runs, committed),
        lost_images=lost,
        left_out=list(runs[-1].left_out) if runs else [],
        masked_reasons=dict(Counter(row.reason for row in masked).most_common()),
    )


class _Tally:
    """Sums over the commit records of one teacher."""

    def __init__(self, plan: Plan, teacher: TeacherManifest, committed: Mask) -> None:
        self.committed = committed
        self.masked_units: list[int] = []
        self.nonfinite: dict[int, Mask] = {}
        self._plan = plan
        self._sizes = {output.name: (output.tokens, output.tokens * output.channels) for output in teacher.spec.outputs}
        self._bytes = self._saturated = 0
        self._squared_error = self._values = self._cosine = self._tokens = 0.0

    def add(self, unit: int, record: dict[str, Any]) -> None:
        """Add what a record says; raises ValueError, KeyError or TypeError where it makes no sense."""
        hidden, unit_rows = record["masked"], min(self._plan.unit_rows, self._plan.rows - unit * self._plan.unit_rows)
        if hidden:
            self.masked_units.append(unit)
        if record["nonfinite"]:
            mask = unpack_mask(record["nonfinite"], unit_rows)
            self.nonfinite[unit] = mask
            hidden += int(np.count_nonzero(mask))
        rows = unit_rows - hidden
        if not 0 <= rows <= unit_rows:
            raise ValueError(f"expected up to {unit_rows} masked rows, found {hidden}")
        for name, output in record["outputs"].items():
            fidelity, tokens, values = output["fidelity"], *self._sizes[name]
            if not 0 <= output["bytes"] < _LARGEST:
                raise ValueError(f"expected a number of bytes, found {output['bytes']}")
            self._bytes += output["bytes"]
            if fidelity is not None:
                if not (0 <= fidelity["rmse"] < _LARGEST and -_LARGEST < fidelity["cosine"] < _LARGEST):
                    raise ValueError(f"expected finite numbers, found {fidelity}")
                if not 0 <= fidelity["saturated"] < _LARGEST:
                    raise ValueError(f"expected a number of values, found {fidelity['saturated']}")
                self._squared_error += fidelity["rmse"] ** 2 * rows * values
                self._values += rows * values
                self._cosine += fidelity["cosine"] * rows * tokens
                self._tokens += rows * tokens
                self._saturated += fidelity["saturated"]

    def status(self) -> TeacherStatus:
        return TeacherStatus(
            committed_units=int(np.count_nonzero(self.committed)),
            units=self._plan.units,
            committed_rows=count_rows(self._plan, self.committed),
            bytes=self._bytes,
            rmse=float(f"{math.sqrt(self._squared_error / self._values):.6g}") if self._values else None,
            cosine=float(f"{self._cosine / self._tokens:.6g}") if self._tokens else None,
            saturated=self._saturated,
        )


def _tally(storage: Storage, plan: Plan, teacher: TeacherManifest) -> _Tally:
    """Parsed by the fastest parser at hand and not checked: 100,000 records have to be read in a few seconds."""
    folder = paths.teacher(teacher.spec.name)
    committed = committed_units(storage, folder, plan.units)
    tally = _Tally(plan, teacher, committed)
    units = np.flatnonzero(committed).tolist()
    records = _each(storage, lambda unit: storage.read(paths.commit(folder, unit)), units)
    for unit, raw in zip(units, records, strict=True):
        try:
            tally.add(unit, from_json(raw, allow_inf_nan=False))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            file = paths.commit(folder, unit)
            raise CorruptError(file, f"is no commit record ({error!r})", unit=unit, teacher=teacher.spec.name) from None
    return tally


def _each(storage: Storage, read: Callable[[int], T], units: list[int]) -> Iterator[T]:
    """What `read` gives of every unit, in order; many at once where each waits for the network."""
    if "://" not in storage.url:
        yield from map(read, units)
        return
    with ThreadPoolExecutor(_REMOTE_READS, thread_name_prefix="kpu-status") as pool:
        for start in range(0, len(units), 1024):  # in batches, so that not all of it waits in memory
            yield from pool.map(read, units[start : start + 1024])


def _masked_rows(storage: Storage, plan: Plan, tallies: dict[str, _Tally]) -> Iterator[MaskedRow]:
    samples = Samples(storage, plan)
    masked_units = {unit for tally in tallies.values() for unit in tally.masked_units}
    statuses = _each(storage, lambda unit: load_status(storage, plan, unit), sorted(masked_units))
    for unit in sorted(masked_units.union(*(tally.nonfinite for tally in tallies.values()))):
        rows = plan.unit_range(unit)
        reasons: list[tuple[int, str]] = []
        if unit in masked_units:
            codes = next(statuses)
            if codes is not None:  # else its images are lost
                reasons += [(int(row), reason(codes[row])) for row in np.flatnonzero(codes)]
        for name, tally in tallies.items():
            hidden = np.flatnonzero(tally.nonfinite.get(unit, np.empty(0, bool)))
            reasons += [(int(row), f"NaN or infinity from teacher {name}") for row in hidden]
        if not reasons:
            continue
        reasons.sort()
        keys = samples.unit(unit)["key"].take([row for row, _ in reasons]).to_pylist()
        for key, (row, why) in zip(keys, reasons, strict=True):
            yield MaskedRow(key, rows[row], why)


def _failed(runs: list[RunRecord], committed: dict[str, Mask]) -> list[RecordedFailure]:
    """The newest failure of each unit and teacher that is not committed since."""
    newest: dict[tuple[str | None, int], RecordedFailure] = {}
    for run in runs:
        for failure in run.failed:
            names = [failure.teacher] if failure.teacher is not None else (run.teachers or list(committed))
            if not all(_is_committed(committed.get(name), failure.unit) for name in names):
                newest[failure.teacher, failure.unit] = failure
    return sorted(newest.values(), key=lambda failure: (failure.unit, failure.teacher or ""))


def _is_committed(committed: Mask | None, unit: int) -> bool:
    return committed is not None and 0 <= unit < len(committed) and bool(committed[unit])
