"""Which outputs of which teachers a run reads; told without loading torch."""

from collections.abc import Collection

from kpu.config.errors import nearest
from kpu.errors import ConfigError
from kpu.reading.cache import open_cache
from trainer.config import TrainConfig


def choose_outputs(config: TrainConfig) -> dict[str, tuple[str, ...]]:
    """Which outputs of which teachers a run reads: the targets of all, and for a side student the base's layers.

    Raises:
        ConfigError: the base is not among the teachers.
    """
    names = config.teachers
    if names is None:
        found = [name for path in config.caches for name in open_cache(path).teachers]
        names = tuple(dict.fromkeys([config.base, *sorted(found)]))
    if config.base not in names:
        near = nearest(config.base, names)
        advice = f"add it, or correct base: did you mean {near!r}?" if near else "add it"
        raise ConfigError(f"teachers: expected the base {config.base!r} among them, found {list(names)}; {advice}")
    extra = config.student.layers if config.student.kind == "side" else ()
    wanted = dict.fromkeys(names, config.outputs)
    wanted[config.base] = tuple(dict.fromkeys([*config.outputs, *extra]))
    return wanted


def not_among(name: str, known: Collection[str], place: str, what: str = "a teacher") -> str:
    """What a message says of a teacher, or what else is named, that is not at `place`, which has those `known`."""
    near = nearest(name, known)
    advice = f"; did you mean {near!r}?" if near else ""
    return f"expected {what} of {place} ({', '.join(sorted(known)) or 'none'}), found {name!r}{advice}"


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with `message` unless something holds."""
    if not holds:
        raise ConfigError(message)
