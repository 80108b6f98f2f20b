"""Write a cache: publish teachers, commit units."""

from concurrent.futures import Executor

import pyarrow as pa

from kpu.commit.teacher import OWN_CALIBRATION, publish_teacher
from kpu.commit.unit import Timer, UnitTransaction, untimed
from kpu.format.plan import Plan
from kpu.format.statistics import Statistics
from kpu.format.teacher import TeacherSpec
from kpu.records.teachers import Head, PublishedTeacher
from kpu.storage.base import Storage


class CacheWriter:
    """What a run writes to a cache whose plan is published.

    Args:
        storage: the cache; the caller holds a lease on it for `run`.
        plan: of the cache.
        run: whose temporary folder is used.
        pool: threads that encode shards; the calling thread if there is none.
    """

    def __init__(self, storage: Storage, plan: Plan, run: str, *, pool: Executor | None = None) -> None:
        self.storage, self.plan, self.run = storage, plan, run
        self._pool = pool

    def teacher(
        self,
        spec: TeacherSpec,
        statistics: dict[str, Statistics],
        head: Head | None,
        *,
        calibration: str = OWN_CALIBRATION,
    ) -> PublishedTeacher:
        """Publish a teacher, or return the one that exists; see `kpu.commit.teacher.publish_teacher`."""
        return publish_teacher(self.storage, self.plan, spec, statistics, head, self.run, calibration=calibration)

    def unit(self, unit: int, table: pa.Table, *, timer: Timer = untimed) -> UnitTransaction:
        """Begin to commit a unit; `table` holds its rows of the sample table."""
        return UnitTransaction(self.storage, self.plan, self.run, unit, table, pool=self._pool, timer=timer)
