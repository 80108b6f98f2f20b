"""Places for workers that may die, and the tasks that nobody holds."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.run.reports import Task


@dataclass
class Seat:
    """One place for an actor and the units it holds.

    `placed` is pending until a node holds the actor, `ready` until `run` knows that it loaded its teachers, then None.
    `attempt` counts actors in this place, this one included, since the last that was known to run.
    """

    actor: Any
    placed: Any
    ready: Any
    attempt: int
    flying: dict[Any, Task] = field(default_factory=dict)


class TaskQueue:
    """Tasks that nobody holds: fresh ones, drawn lazily, and suspects that were lost with a worker."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._fresh = iter(tasks)
        self._next: Task | None = next(self._fresh, None)
        self.suspects: deque[Task] = deque()

    def __bool__(self) -> bool:
        return self._next is not None or bool(self.suspects)

    def fresh(self) -> Task | None:
        """The next task that was never given out; None if there is none."""
        task = self._next
        if task is not None:
            self._next = next(self._fresh, None)
        return task
