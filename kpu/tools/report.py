"""What checking a cache found."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Final, Literal, TypeVar

from kpu.errors import CorruptError, KpuError, MissingUnitError
from kpu.records.plan import read_checked
from kpu.storage.base import Storage

NOT_COMMITTED: Final = "is missing: the unit is not committed"
Kind = Literal["damaged", "absent", "foreign", "unreadable"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file; `unit` and `teacher` are None if it belongs to none.

    `kind` is `damaged` where it is not what was committed, `absent` where a unit is not committed, `foreign` where it
    does not belong to the cache, `unreadable` where its place failed.
    """

    file: str
    unit: int | None
    teacher: str | None
    reason: str
    kind: Kind = "damaged"


@dataclass
class VerifyReport:
    """Every problem that was found, by file, and how many files and bytes were read."""

    problems: list[Problem] = field(default_factory=list)
    files: int = 0
    bytes: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def with_problems(self, problems: Iterable[Problem]) -> "VerifyReport":
        """The same report with other problems."""
        return VerifyReport(list(problems), self.files, self.bytes)

    def as_json(self) -> dict[str, Any]:
        problems = [vars(problem) for problem in self.problems]
        return {"ok": self.ok, "problems": problems, "files": self.files, "bytes": self.bytes}


class ReportBuilder:
    """Collects problems from several threads."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._report = VerifyReport()
        self._lock = Lock()

    def add(
        self, file: str, reason: str, *, unit: int | None = None, teacher: str | None = None, kind: Kind = "damaged"
    ) -> None:
        with self._lock:
            self._report.problems.append(Problem(file, unit, teacher, reason, kind))

    def add_foreign(self, file: str, *, unit: int | None = None, teacher: str | None = None) -> None:
        self.add(file, "does not belong to the cache", unit=unit, teacher=teacher, kind="foreign")

    def count(self, size: int) -> None:
        with self._lock:
            self._report.files += 1
            self._report.bytes += size

    def attempt(
        self, file: str, check: Callable[[], _T], *, unit: int | None = None, teacher: str | None = None
    ) -> _T | None:
        """What `check` returns; None after noting what it complains of."""
        try:
            return check()
        except CorruptError as error:
            self.add(error.file, error.reason, unit=unit, teacher=teacher)
        except MissingUnitError:
            self.add(file, NOT_COMMITTED, unit=unit, teacher=teacher, kind="absent")
        except KpuError as error:
            self.add(file, str(error), unit=unit, teacher=teacher, kind="unreadable")
        return None

    def check_file(self, file: str, expected: str, *, teacher: str | None = None) -> bytes | None:
        """The bytes of a file whose digest is known; None after noting what is wrong with it."""
        raw = self.attempt(file, lambda: read_checked(self.storage, file, expected), teacher=teacher)
        if raw is not None:
            self.count(len(raw))
        return raw

    def finish(self) -> VerifyReport:
        self._report.problems.sort(key=lambda problem: (problem.file, problem.reason))
        return self._report
