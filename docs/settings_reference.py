"""A hook of mkdocs: the reference of configuration keys, from the models that validate them."""

import json
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kpu.config.errors import expected_of

_MARKER = re.compile(r"<!-- settings: ([\w.]+)\.(\w+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each `<!-- settings: module.Model -->` with tables of its keys."""
    return _MARKER.sub(lambda match: reference(getattr(import_module(match[1]), match[2])), markdown)


def reference(model: type[BaseModel]) -> str:
    """Tables of the keys of a configuration: those of the top level, then those of each section."""
    return "\n\n".join(_tables(model, ""))


def _tables(model: type[BaseModel], prefix: str) -> Iterator[str]:
    rows, sections = [], []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        key = f"{prefix}{name}"
        if section is None:
            rows.append(f"| `{key}` | {_escape(expected_of(field) or '')} | {_default(field)} | {_meaning(field)} |")
        else:
            named = f"{key}.<name>." if get_origin(field.annotation) is dict else f"{key}."
            sections.append((section, named, _meaning(field)))
    if rows:
        yield "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])
    for section, named, meaning in sections:
        yield f"### `{named.rstrip('.')}`\n\n{meaning}"
        yield from _tables(section, named)


def _section(annotation: Any) -> type[BaseModel] | None:
    return next(
        (
            each
            for each in (annotation, *get_args(annotation))
            if isinstance(each, type) and issubclass(each, BaseModel)
        ),
        None,
    )


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{json.dumps(value, default=str)}`"


def _meaning(field: FieldInfo) -> str:
    return _escape(" ".join((field.description or "").split()))


def _escape(text: str) -> str:
    return re.sub(r"<(?=[\w/])", "&lt;", text).replace("|", "\\|") if "`" not in text else text.replace("|", "\\|")
