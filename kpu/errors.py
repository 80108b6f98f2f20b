"""Every error that KPU raises on purpose, in one tree.

The message of each names the field or file, what was expected, what was found and what to do. `exit_code` is what a
command ends with when the error reaches it: 2 for wrong usage, configuration or input, 1 for work left undone.
"""

from typing import Any


class KpuError(Exception):
    """Root of all errors raised on purpose. They survive pickling whatever their constructor takes.

    `machine` is the host that raised it, if that is another one's than the reader's; the message ends with it.
    """

    exit_code = 2
    machine: str | None = None

    def __str__(self) -> str:
        message = super().__str__()
        return message if self.machine is None else on_machine(message, self.machine)

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), self.args, self.__dict__)


def on_machine(message: str, machine: str) -> str:
    """A message with the host that it comes from, unless it names that already."""
    return message if f"on {machine} " in message else f"{message} (on {machine})"


def _rebuild(kind: type[KpuError], args: tuple[Any, ...], state: dict[str, Any]) -> KpuError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(KpuError):
    """A configuration key or command-line value is unknown, malformed or contradicts another."""


class SourceError(KpuError):
    """The image source is empty, unreadable, malformed, or has duplicate keys."""

    def with_advice(self, advice: str) -> "SourceError":
        """The same error, with a further sentence; its exit code stays."""
        more = SourceError(f"{self}. {advice}")
        more.exit_code = self.exit_code
        return more


class TeacherError(KpuError):
    """A teacher is unknown, does not load, has other weights than expected, or emits something unusable."""


class NonFiniteError(TeacherError):
    """A teacher emitted NaN or infinity for a row."""

    exit_code = 1


class MismatchError(KpuError):
    """The cache was made from other data, another teacher or another configuration."""


class TrustError(KpuError):
    """A file names code that the user neither named nor trusts; nothing of it was run."""


class TrainingError(KpuError):
    """Training went wrong: the loss is not finite, or a part of the model collapsed."""


class StorageError(KpuError):
    """The cache's location cannot be read or written."""


class FullDiskError(StorageError):
    """The disk or quota is full. Nothing that was committed is lost."""

    exit_code = 1


class StorageFault(StorageError):
    """The disk, the network or the object store failed, for a reason that may pass: nothing is wrong with the input."""

    exit_code = 1


class LinkError(StorageError):
    """A symbolic link, pipe or device lies where a cache, a run or an export has a file or folder of its own."""


class CacheError(KpuError):
    """Something is wrong with, or missing from, a cache that is being read."""


class NotACacheError(CacheError):
    """There is no cache at this path, or one of a format version that this release cannot read."""


class CorruptError(CacheError):
    """A file of the cache does not hold what was committed.

    `file` is the path inside the cache; `unit` and `teacher` are set where the file belongs to one.
    """

    exit_code = 1

    def __init__(self, file: str, reason: str, *, unit: int | None = None, teacher: str | None = None) -> None:
        super().__init__(f"{file}: {reason}")
        self.file, self.reason, self.unit, self.teacher = file, reason, unit, teacher

    def within(self, cache: str) -> "CorruptError":
        """The same error for somebody who reads several caches: it names this one, and what mends it."""
        found = CorruptError(self.file, self.reason, unit=self.unit, teacher=self.teacher)
        advice = f"`kpu-cache repair {cache}`, then the extract command that made the cache, mends it"
        found.args = (f"{cache}: {self}; {advice}",)
        return found


class MissingUnitError(CacheError):
    """A row was asked for whose unit is not committed for that teacher."""

    exit_code = 1

    def __init__(self, teacher: str, unit: int) -> None:
        super().__init__(
            f"teacher {teacher!r} has no committed unit {unit}: the extraction is incomplete; "
            "run the same `kpu-cache extract` command again, or look at `kpu-cache status`"
        )
        self.teacher, self.unit = teacher, unit


class MaskedRowError(CacheError):
    """A masked row was read without asking for NaN in its place."""


class IncompleteError(KpuError):
    """The work ended with units left undone."""

    exit_code = 1
