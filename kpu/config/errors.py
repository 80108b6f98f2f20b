"""Format validation errors: the key, what was expected there, what was found."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from kpu.errors import ConfigError

EXPECTED: Final = "expected"
LARGEST: Final = 2**31 - 1
"""Of any count that a configuration gives; what is larger is a slip, and would end as an error of some library."""


class SettingsError(ConfigError):
    """A configuration is wrong: `where` it comes from, and `complaints` by key, the empty one for the whole."""

    def __init__(self, where: str, complaints: Mapping[str, Sequence[str]]) -> None:
        lines = dict.fromkeys(line for lines in complaints.values() for line in lines)
        super().__init__(f"{where}: {'; '.join(lines)}")
        self.where, self.complaints = where, complaints

    def at(self, where: str) -> "SettingsError":
        """The same complaints about another place."""
        return SettingsError(where, self.complaints)


def explain(
    error: ValidationError, schema: type[BaseModel], values: Mapping[str, Any], how: Mapping[str, str]
) -> dict[str, list[str]]:
    """Every complaint about `values`, as clauses of a message by key; `how` to give a key that is missing."""
    complaints: dict[str, list[str]] = {}
    for item in error.errors():
        key = ".".join(_locate(schema, item["loc"])[0])
        complaints.setdefault(key, []).append(_explain(item, schema, values, how))
    return complaints


def _explain(item: Any, schema: type[BaseModel], values: Mapping[str, Any], how: Mapping[str, str]) -> str:
    path, field, section = _locate(schema, item["loc"])
    key, kind, message = ".".join(path), item["type"], item["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return _unknown([*path, str(item["loc"][len(path)])], sorted(section.model_fields) if section else [])
    if kind == "missing" and len(path) == len(item["loc"]):
        return f"{key}: is required and was not given" + (f"; give {how[key]}" if key in how else "")
    if kind == "value_error":  # of the whole configuration, where there is no key
        return f"{key}: {message}" if key else message
    if section is not None:
        message = f"expected a mapping of {', '.join(section.model_fields)}"
    elif item.get("ctx", {}).get("le") == LARGEST:
        message = f"expected up to {LARGEST}"
    elif field is not None and (expected := expected_of(field)):
        message = f"expected {expected}"
    else:
        number = "a number " if kind.startswith(("greater", "less")) else ""
        message = message.replace("Input should be ", f"expected {number}")
    return f"{key}: {message}, found {_at(values, path)!r}"


def expected_of(field: FieldInfo) -> str | None:
    """What a field says is expected of its value; None if it does not."""
    extra = field.json_schema_extra
    found = extra.get(EXPECTED) if isinstance(extra, dict) else None
    return found if isinstance(found, str) else None


def _at(values: Any, path: Sequence[str]) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def _unknown(path: Sequence[str], known: Sequence[str]) -> str:
    near = nearest(path[-1], known)
    advice = f"did you mean {near!r}?" if near else f"expected one of {', '.join(known)}"
    return f"unknown key {'.'.join(path)!r}; {advice}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` was probably meant to be; None if none is like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def _locate(
    schema: type[BaseModel], place: Sequence[Any]
) -> tuple[list[str], FieldInfo | None, type[BaseModel] | None]:
    """The part of a place that names keys of the file, and the field or the section that is there.

    What follows in `place` is pydantic's own: members of a union, positions in a list.
    """
    path: list[str] = []
    field: FieldInfo | None = None
    section: type[BaseModel] | None = schema
    named = False  # the next key is the user's, not the schema's: the name of a teacher
    for part in place:
        if named:
            named = False
        elif section is not None and part in section.model_fields:
            field = section.model_fields[part]
            section = _section(field.annotation)
            named = section is not None and get_origin(field.annotation) is dict
        else:
            break
        path.append(str(part))
    return path, field, None if named else section


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section inside `Section | None` or `dict[str, Section]`."""
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
