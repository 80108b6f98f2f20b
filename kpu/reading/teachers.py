"""The teachers of an open cache."""

from collections.abc import Iterator, Mapping
from functools import cached_property

from kpu.format.codecs import QuantGrid
from kpu.format.plan import Plan
from kpu.format.statistics import Statistics
from kpu.format.teacher import OutputSpec, TeacherSpec
from kpu.records.teachers import Head, PublishedTeacher, load_teacher, teacher_names
from kpu.records.units import Mask, committed_units
from kpu.storage import paths
from kpu.storage.base import Storage


class CachedTeacher:
    """One teacher of a cache."""

    def __init__(self, storage: Storage, plan: Plan, name: str) -> None:
        self._storage, self._plan, self.name = storage, plan, name

    @cached_property
    def published(self) -> PublishedTeacher:
        """Everything published of the teacher except its units; loaded and checked at first use."""
        return load_teacher(self._storage, self._plan, self.name)

    @property
    def spec(self) -> TeacherSpec:
        return self.published.spec

    @property
    def outputs(self) -> dict[str, OutputSpec]:
        """By name, in stored order."""
        return {output.name: output for output in self.spec.outputs}

    @property
    def statistics(self) -> dict[str, Statistics]:
        """By output: moments of the unquantised features over the calibration rows."""
        return self.published.statistics

    @property
    def head(self) -> Head | None:
        """The teacher's linear classifier on `global`: weight float32 [C, D], bias float32 [C]."""
        return self.published.head

    def grid(self, output: str) -> QuantGrid:
        """How the output is stored."""
        return self.published.grids[output]

    def committed(self) -> Mask:
        """Which units can be read, as listed now, bool [units]."""
        return committed_units(self._storage, paths.teacher(self.name), self._plan.units)


class Teachers(Mapping[str, CachedTeacher]):
    """The teachers that stood when the cache was opened, by name."""

    def __init__(self, storage: Storage, plan: Plan) -> None:
        self._teachers = {name: CachedTeacher(storage, plan, name) for name in teacher_names(storage)}

    def __getitem__(self, name: str) -> CachedTeacher:
        return self._teachers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._teachers)

    def __len__(self) -> int:
        return len(self._teachers)
