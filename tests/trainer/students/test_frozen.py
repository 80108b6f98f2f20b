"""The control that learns nothing."""

import pytest
import torch

from kpu.errors import ConfigError
from trainer.data.shapes import OutputShape
from trainer.sections import StudentConfig
from trainer.students import BaseInfo, make_student

BASE = BaseInfo(None, {"global": OutputShape(3), "patch": OutputShape(2, (1, 2))}, {})  # type: ignore[arg-type]


def test_is_the_base() -> None:
    student = make_student(StudentConfig(kind="frozen"), BASE, ("global",))
    x = {"global": torch.randn(2, 3), "patch": torch.randn(2, 2, 2)}
    found = student(x)
    assert list(found) == ["global"]
    assert torch.equal(found["global"], x["global"])
    assert list(student.parameters()) == []
    assert not student.needs_images
    assert student.shapes == {"global": OutputShape(3)}


def test_concat_belongs_to_side() -> None:
    with pytest.raises(ConfigError, match=r"student\.merge: expected add with kind frozen, found concat"):
        make_student(StudentConfig(kind="frozen", merge="concat"), BASE, ("global",))
