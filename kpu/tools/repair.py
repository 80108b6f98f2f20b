"""Mending a damaged cache: units that verification finds damaged are withdrawn, so that they are extracted again."""

import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from kpu.records.teachers import teacher_folders
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.storage.open import open_storage
from kpu.tools.report import Problem
from kpu.tools.verify import VerifyReport, verify


@dataclass(frozen=True)
class Repair:
    """`withdrawn` are the commit records that were moved aside, by file; `left` are problems that this cannot mend."""

    report: VerifyReport
    withdrawn: tuple[str, ...]
    left: tuple[Problem, ...]

    def as_json(self) -> dict[str, Any]:
        return {"withdrawn": list(self.withdrawn), "left": [asdict(problem) for problem in self.left]}


def repair(
    path: str | os.PathLike[str], *, dry_run: bool = False, progress: Callable[[int, int], None] | None = None
) -> Repair:
    """Verify a whole cache, and withdraw the commit records of damaged units, for extraction to compute them again.

    Records are moved into quarantine. Shards stay where they are: extraction keeps those that are sound and agree
    with what it computes, and moves the others aside. Where a unit's images are damaged, or not committed though a
    teacher's unit is, the unit is withdrawn of every teacher, so that all of them see the same images again. A file
    that could not be read, or that belongs to no unit, is left. `dry_run` changes nothing.

    Raises:
        NotACacheError: there is no cache, or one of another format version.
        StorageError: a record cannot be moved.
    """
    storage = open_storage(path)
    report = verify(storage, progress=progress)
    records = _standing(storage, filter(_is_mendable, report.problems))
    if not dry_run:
        run = f"repair-{secrets.token_hex(4)}"
        for record in records:
            storage.quarantine(record, run=run)
    return Repair(report, tuple(records), tuple(p for p in report.problems if not _is_mendable(p)))


def _is_mendable(problem: Problem) -> bool:
    return problem.unit is not None and problem.kind in ("damaged", "absent")


def _standing(storage: Storage, problems: Iterable[Problem]) -> list[str]:
    """The existing commit records of the units that these problems concern: those of the images after teachers'."""
    teachers = teacher_folders(storage)
    of_teachers, of_images = set[str](), set[str]()
    for problem in problems:
        assert problem.unit is not None
        if problem.teacher is None:
            images = paths.commit(paths.IMAGES, problem.unit)
            if problem.kind == "absent" and storage.size(images) is not None:
                continue  # another run has committed it since
            of_images.add(images)
        names = teachers if problem.teacher is None else [problem.teacher]
        of_teachers.update(paths.commit(paths.teacher(name), problem.unit) for name in names)
    return [file for file in [*sorted(of_teachers), *sorted(of_images)] if storage.size(file) is not None]
