"""Configuration files: YAML read strictly, the command line's values laid over it, the whole validated by a schema."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kpu.config.errors import EXPECTED, LARGEST, SettingsError, explain
from kpu.config.strict_yaml import parse_yaml
from kpu.errors import ConfigError

COUNT: Final = "a whole number above 0"
COUNT_OR_AUTO: Final = f"{COUNT}, or auto"
Positive = Annotated[int, Field(gt=0, le=LARGEST)]


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys refused. The docstring below a field says what it means."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def setting(expected: str, *, default: Any = ...) -> Any:
    """A field of a `Section`, required without a default; messages and the reference say that `expected` is."""
    return Field(default=default, json_schema_extra={EXPECTED: expected})


T = TypeVar("T")
Schema = TypeVar("Schema", bound=Section)


def validate(
    schema: type[Schema], values: Mapping[str, Any], where: str, how: Mapping[str, str] | None = None
) -> Schema:
    """Validate plain values.

    Args:
        schema: of the whole configuration.
        values: by key, as a file or the command line gave them.
        where: names them in messages.
        how: by key, how to give one that is required, where its name alone does not say it.

    Raises:
        ConfigError: naming every wrong key, what was expected and what was found.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise SettingsError(where, explain(error, schema, values, how or {})) from None


def as_schema(
    schema: type[Schema],
    config: Schema | Mapping[str, Any] | str | os.PathLike[str],
    check: Callable[[Mapping[str, Any], str], Schema],
    load: Callable[[str | os.PathLike[str]], Schema],
) -> Schema:
    """A configuration as it is, its plain values checked, or the file at a path loaded."""
    if isinstance(config, schema):
        return config
    return check(config, "config") if isinstance(config, Mapping) else load(config)  # type: ignore[arg-type]


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file; none where it is empty.

    Raises:
        ConfigError: it cannot be read, is no YAML, is no mapping, or gives a key twice.
    """
    try:
        values = parse_yaml(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(values).__name__}")
    return values


_OWN_KEYS: Final = {
    "kpu-cache extract": {"data", "views", "crop", "unit_rows", "calibration_rows", "calibration_from"},
    "kpu-train fit": {"caches", "base", "student", "targets", "projector", "loss", "unify", "optim"},
    "kpu-train ablate": {"grid", "seeds", "config"},
}


def check_command(values: Mapping[str, Any], path: str | os.PathLike[str], command: str) -> None:
    """Refuse a file that is a configuration of another command, by the keys that only one of them has.

    Raises:
        ConfigError: naming the command that it belongs to.
    """
    found = {name: sorted(keys & values.keys()) for name, keys in _OWN_KEYS.items()}
    other = max(found, key=lambda name: len(found[name]))
    if found[other] and not found[command]:
        raise ConfigError(
            f"{path}: expected a configuration of `{command}`, found one of `{other}` (it has "
            f"{', '.join(found[other])}); use it with `{other} -c {path}`"
        )


def split(assignment: str, flag: str, form: str) -> tuple[str, str]:
    """The two sides of a flag's KEY=VALUE; `form` is what messages call it.

    Raises:
        ConfigError: a side is missing.
    """
    key, separator, value = assignment.partition("=")
    if not separator or not key or not value:
        raise ConfigError(f"{flag} {assignment!r}: expected {form}")
    return key, value


def override(values: dict[str, Any], assignments: Sequence[str]) -> None:
    """Lay `--set KEY.PATH=YAML` over `values`, one after another.

    Raises:
        ConfigError: one is malformed, or goes through a key that is no mapping.
    """
    for assignment in assignments:
        key, text = split(assignment, "--set", "KEY=VALUE")
        *parents, leaf = key.split(".")
        try:
            section(values, parents)[leaf] = parse_yaml(text)
        except ValueError as error:
            reason = f"the value {error}" if str(error).startswith("is not") else str(error)
            raise ConfigError(f"--set {key}={text}: {reason}") from None


def validate_overridden(
    values: Mapping[str, Any], assignments: Sequence[str], file: str | None, check: Callable[[dict[str, Any], str], T]
) -> T:
    """Lay `--set KEY.PATH=YAML` over `values`, of `file` if there is one, and `check(values, where)` the whole.

    Raises:
        ConfigError: naming the file, the assignments, or both: whichever it comes from.
    """
    changed, where = copy.deepcopy(dict(values)), file or "command line"
    override(changed, assignments)
    try:
        return check(changed, where)
    except SettingsError as error:
        if file is None or not assignments:
            raise
        named = [assignment for assignment in assignments if _is_about(assignment.partition("=")[0], error.complaints)]
        flags = " ".join(f"--set {assignment}" for assignment in named or assignments)
        if _passes(values, check):
            where = flags
        elif named:
            where = f"{file} with {flags}"
        raise error.at(where) from None


def _is_about(assigned: str, complaints: Mapping[str, Sequence[str]]) -> bool:
    """Whether a complaint is about a key that was assigned, one within it, or one that it is in."""
    keys = [key for key in complaints if key]
    return any(f"{key}.".startswith(f"{assigned}.") or f"{assigned}.".startswith(f"{key}.") for key in keys)


def _passes(values: Mapping[str, Any], check: Callable[[dict[str, Any], str], object]) -> bool:
    try:
        check(dict(values), "")
    except ConfigError:
        return False
    return True


def section(values: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The mapping at `path` within `values`, made where it is missing.

    Raises:
        ConfigError: something else is in the way.
    """
    for depth, name in enumerate(path):
        child = values.setdefault(name, {})
        if child is None:
            child = values[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{'.'.join(path[: depth + 1])}: expected a mapping of keys, found {child!r}")
        values = child
    return values
