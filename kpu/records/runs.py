"""What runs left behind in `runs/<id>.json`. They inform people; nothing in a cache relies on them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from kpu.records.leftout import LeftOut
from kpu.storage.base import Storage
from kpu.storage.paths import RUNS
from kpu.util.strict_json import parse_json_object


@dataclass(frozen=True)
class RecordedFailure:
    """A unit that a run could not commit; `teacher` is None if the failure struck all teachers of the run."""

    teacher: str | None
    unit: int
    reason: str


@dataclass(frozen=True)
class RunRecord:
    """One run. `status` is running, complete, incomplete or interrupted; `running` may also mean killed.

    `left_out` is what its listing of the source passed over.
    """

    id: str
    started: str
    finished: str | None = None
    status: str = "running"
    rows: int = 0
    seconds: float = 0.0
    rows_per_second: float = 0.0
    failed: tuple[RecordedFailure, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers that the run was to extract, where its configuration says so."""
        teachers = self.config.get("teachers")
        return tuple(teachers) if isinstance(teachers, dict) else ()


def load_runs(storage: Storage) -> list[RunRecord]:
    """Every run, the oldest first. A file that cannot be understood is left out: no harm comes of it."""
    found = []
    for name in storage.names(RUNS):
        if name.endswith(".json"):
            try:
                document = parse_json_object(storage.read(f"{RUNS}/{name}"))
            except (FileNotFoundError, ValueError):
                continue
            found.append(_parse(document, name.removesuffix(".json")))
    return sorted(found, key=lambda run: (run.started, run.id))


def latest_run(storage: Storage) -> RunRecord | None:
    """The run that was started last; None if there is none."""
    runs = load_runs(storage)
    return runs[-1] if runs else None


def _parse(document: dict[str, Any], name: str) -> RunRecord:
    def of(kind: type | tuple[type, ...], key: str, default: Any) -> Any:
        value = document.get(key)
        return value if isinstance(value, kind) and not isinstance(value, bool) else default

    return RunRecord(
        id=of(str, "id", name),
        started=of(str, "started", ""),
        finished=of(str, "finished", None),
        status=of(str, "status", "running"),
        rows=of(int, "rows", 0),
        seconds=of((int, float), "seconds", 0.0),
        rows_per_second=of((int, float), "rows_per_second", 0.0),
        failed=tuple(_failures(of(list, "failed", []))),
        config=of(dict, "config", {}),
        left_out=tuple(_left_out(of(list, "left_out", []))),
    )


def _left_out(entries: Iterable[Any]) -> Iterable[LeftOut]:
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("count"), int):
            yield LeftOut(str(entry.get("reason", "")), entry["count"], str(entry.get("example", "")))


def _failures(entries: Iterable[Any]) -> Iterable[RecordedFailure]:
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("unit"), int):
            teacher = entry.get("teacher")
            yield RecordedFailure(
                teacher if isinstance(teacher, str) else None, entry["unit"], str(entry.get("reason", ""))
            )
