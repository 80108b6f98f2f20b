"""Validated, immutable values, and the bounds of their numbers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Bounds of what a stranger's file may claim, far beyond anything real: nothing is allocated by larger numbers.
Count = Annotated[int, Field(ge=0, lt=2**63)]
MOST_LENGTH = 2**24
"""Of one dimension of an array or an image."""
Length = Annotated[int, Field(ge=1, le=MOST_LENGTH)]
MOST_VALUES = 2**28
"""Of one output in one row."""


class Frozen(BaseModel):
    """A validated, immutable value that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
