"""What a run did: `runs/<id>.json` for programs and people, `runs/<id>-<part>.jsonl` as its log, one line a unit.

These files say when, where and how fast; nothing else in a cache does.
"""

import json
import os
import platform
import secrets
import socket
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from time import perf_counter
from types import TracebackType
from typing import Any

from kpu.errors import StorageError
from kpu.format.plan import Plan
from kpu.sources import LeftOut
from kpu.storage.base import Storage
from kpu.storage.places import redact
from kpu.util.versions import installed_versions
from pipeline.config import ExtractConfig
from pipeline.run.reports import STAGES, Task, UnitFailure, UnitReport

PACKAGES = (
    "kpu",
    "torch",
    "torchvision",
    "timm",
    "ray",
    "numpy",
    "pillow",
    "zarr",
    "numcodecs",
    "pyarrow",
    "transformers",
)
SAVE_EVERY_SECONDS = 30
LINES_PER_PART = 1000


@dataclass(frozen=True)
class RunSummary:
    """The outcome: `remaining_units` units still lack a teacher; `failures` are those of this run.

    `masked` rows have no image that can be decoded; `reasons` counts them by why. By teacher that has any, `saturated`
    is the share of values beyond the range of the codec, and `nonfinite` the number of other rows that are masked for
    this teacher alone, which gave NaN or infinity for them. `left_out` is what the listing of the source passed over.
    """

    id: str
    out: str
    rows: int
    seconds: float
    bytes: int
    masked: int
    remaining_units: int
    failures: tuple[UnitFailure, ...]
    saturated: dict[str, float] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.remaining_units == 0

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds if self.seconds else 0.0


def new_run_id() -> str:
    """Sorts by start; unique among drivers that start in the same second."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


class Run:
    """Keeps the two files of one run up to date; leaving the context by an error records it as interrupted."""

    def __init__(
        self, storage: Storage, run_id: str, config: ExtractConfig, left_out: tuple[LeftOut, ...] = ()
    ) -> None:
        self._storage = storage
        self.id = run_id
        self._out = config.out
        self._left_out = left_out
        self._clock = perf_counter()
        self._saved = self._clock
        self._totals = dict.fromkeys(STAGES, 0.0)
        self._rows = self._bytes = self._masked = 0
        self._failures: list[UnitFailure] = []
        self._saturated: Counter[str] = Counter()
        self._values: Counter[str] = Counter()
        self._nonfinite: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._lines: list[str] = []
        self._part = 0
        self._document: dict[str, Any] = {
            "id": run_id,
            "status": "running",
            "started": _now(),
            "finished": None,
            "config": config.model_dump(mode="json"),
            "left_out": [asdict(item) for item in left_out],
            "host": {
                "name": socket.gethostname(),
                "pid": os.getpid(),
                "platform": platform.platform(),
                "cpus": os.cpu_count(),
            },
            "versions": {"python": platform.python_version(), **installed_versions(PACKAGES)},
        }

    def __enter__(self) -> "Run":
        self._save()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._document["error"] = redact(f"{type(error).__name__}: {error}")
            with suppress(StorageError):  # a full disk, say, must not hide what went wrong
                self._close("interrupted")

    def started(self, plan: Plan, startup: dict[str, float]) -> None:
        """Extraction begins now; `startup` is seconds of each phase before it, which rows_per_second leaves out."""
        self._document |= {"plan": plan.digest, "startup_seconds": {k: round(v, 3) for k, v in startup.items()}}
        self._clock = perf_counter()
        self._save()

    def record(self, report: UnitReport) -> None:
        """Add one finished unit."""
        failed = {failure.teacher for failure in report.failures}
        if report.bytes or not failed:
            self._rows += report.rows
        self._bytes += report.bytes
        self._masked += report.masked
        for stage, seconds in report.seconds.items():
            self._totals[stage] += seconds
        self._failures += report.failures
        for name, (saturated, values) in report.saturated.items():
            self._saturated[name] += saturated
            self._values[name] += values
        self._nonfinite.update(report.nonfinite)
        self._reasons.update(report.reasons)
        self._lines.append(json.dumps({"time": _now(), **asdict(report)}, ensure_ascii=False))
        if perf_counter() - self._saved > SAVE_EVERY_SECONDS:
            self._save()

    def finish(self, remaining: Iterable[Task]) -> RunSummary:
        """Write the outcome; `remaining` are the tasks that a next run would do."""
        left = sum(1 for _ in remaining)
        self._close("complete" if left == 0 else "incomplete")
        return RunSummary(
            self.id, self._out, self._rows, self._document["seconds"], self._bytes, self._masked, left,
            tuple(self._failures), self._saturated_shares(), self._nonfinite_rows(), self._left_out,
            dict(self._reasons.most_common()),
        )  # fmt: skip

    def _saturated_shares(self) -> dict[str, float]:
        """The share of each teacher's values; teachers without any are left out."""
        return {name: float(f"{count / self._values[name]:.6g}") for name, count in self._saturated.items() if count}

    def _nonfinite_rows(self) -> dict[str, int]:
        return {name: rows for name, rows in self._nonfinite.items() if rows}

    def _close(self, status: str) -> None:
        self._document |= {"status": status, "finished": _now()}
        self._save()

    def _save(self) -> None:
        seconds = perf_counter() - self._clock
        self._document |= {
            "rows": self._rows,
            "seconds": round(seconds, 3),
            "rows_per_second": round(self._rows / seconds, 3) if seconds else 0.0,
            "stage_seconds": {stage: round(total, 3) for stage, total in self._totals.items()},
            "bytes": self._bytes,
            "masked": self._masked,
            "masked_reasons": dict(self._reasons.most_common()),
            "nonfinite": self._nonfinite_rows(),
            "saturated": self._saturated_shares(),
            "failed": [asdict(failure) for failure in self._failures],
        }
        text = json.dumps(self._document, indent=1, ensure_ascii=False)
        self._storage.replace(f"runs/{self.id}.json", text.encode(), run=self.id)
        self._save_log()
        self._saved = perf_counter()

    def _save_log(self) -> None:
        """Write the lines that are not written yet; a part is written again until it is full."""
        full = len(self._lines) // LINES_PER_PART
        for index in range(full + bool(len(self._lines) % LINES_PER_PART)):
            lines = self._lines[index * LINES_PER_PART : (index + 1) * LINES_PER_PART]
            key = f"runs/{self.id}-{self._part + index:04d}.jsonl"
            self._storage.replace(key, ("\n".join(lines) + "\n").encode(), run=self.id)
        del self._lines[: full * LINES_PER_PART]
        self._part += full


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
