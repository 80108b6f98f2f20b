"""What documents of a run say was measured, checked before anybody reckons with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kpu.errors import CorruptError
from kpu.format.base import Count

_Number = Annotated[float, Field(ge=0)]


class _Document(BaseModel):
    """Keys that are reckoned with; others may be there."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Scores(_Document):
    teachers: dict[str, dict[str, Any]]
    base: dict[str, Any]

    @field_validator("teachers", "base")
    @classmethod
    def _r2_are_numbers(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, figures in value.items():
            for key, found in figures.items() if isinstance(figures, dict) else [(name, figures)]:
                if key.startswith("r2") and (isinstance(found, bool) or not isinstance(found, float | int | None)):
                    raise ValueError(f"expected a number or null as {key}, found {found!r}")
        return value


class _Summary(_Document):
    steps: Count
    rows: Count = 0
    seconds: _Number
    rows_per_second: _Number | None = None
    parameters: Count
    validation_rows: Count
    validation: _Scores


def check_summary(document: Mapping[str, Any], path: Path, advice: str) -> None:
    """Check how a run ended. Raises CorruptError, naming the key."""
    _check(_Summary, document, path, advice)


def check_scores(document: Any, path: Path, advice: str) -> None:
    """Check R2 by teacher and output, and of the base. Raises CorruptError, naming the key."""
    _check(_Scores, document, path, advice)


def _check(kind: type[_Document], document: Any, path: Path, advice: str) -> None:
    try:
        kind.model_validate(document)
    except ValidationError as error:
        found = error.errors()[0]
        key = ".".join(map(str, found["loc"]))
        raise CorruptError(str(path), f"{key}: {found['msg']}; {advice}") from None
