"""Reading YAML strictly, laying values over it, and naming what is wrong by a schema."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError, model_validator

from kpu.config.settings import Positive, Section, override, read_yaml, section, setting, split, validate
from kpu.errors import ConfigError


class Inner(Section):
    width: int = setting("a whole number", default=1)


class Outer(Section):
    name: str = setting("a name")
    inner: Inner = Inner()

    @model_validator(mode="after")
    def _no_wide_dots(self) -> "Outer":
        if self.name == "dot" and self.inner.width > 1:
            raise ValueError("expected no wide dot")
        return self


def test_sections_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Inner().width = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "here: name: is required and was not given; give --name"),
        ({"name": "a", "inner": {"widht": 1}}, "here: unknown key 'inner.widht'; did you mean 'width'?"),
        ({"name": "a", "inner": {"width": "x"}}, "here: inner.width: expected a whole number, found 'x'"),
        ({"name": "a", "inner": 3}, "here: inner: expected a mapping of width, found 3"),
        ({"name": "dot", "inner": {"width": 2}}, "here: expected no wide dot"),
        ({"name": 1, "other": 2}, "here: name: expected a name, found 1; unknown key 'other'; expected one of inner"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(Outer, values, "here", {"name": "--name"})
    assert str(error.value).startswith(message)


def test_without_a_hint_the_key_alone_is_named() -> None:
    with pytest.raises(ConfigError, match=r"here: name: is required and was not given$"):
        validate(Outer, {}, "here")


def test_a_valid_configuration() -> None:
    assert validate(Outer, {"name": "a", "inner": {"width": 3}}, "here").inner.width == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1, c: 2}\n", "line 2: expected each key once, found 'c' again; remove one"),
        ("[1, 2]", "expected a mapping of keys, found list"),
        ("a: [", "is not YAML"),
        ("a: \x00", "is not YAML"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


def test_files_that_are_read(tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text("a: &x {b: 1}\nc: *x\n")
    assert read_yaml(file) == {"a": {"b": 1}, "c": {"b": 1}}
    file.write_text("# nothing\n")
    assert read_yaml(file) == {}
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_yaml(tmp_path / "none.yaml")


def test_overrides_are_laid_over_one_after_another() -> None:
    values: dict[str, Any] = {"a": {"b": 1, "c": 2}, "d": None}
    override(values, ["a.b=[1, 2]", "d.e=x=y", "a.c=3", "a.c=4"])
    assert values == {"a": {"b": [1, 2], "c": 4}, "d": {"e": "x=y"}}
    with pytest.raises(ConfigError, match=r"a\.c: expected a mapping of keys, found 4"):
        override(values, ["a.c.x=1"])
    with pytest.raises(ConfigError, match=r"--set a=\[: the value is not YAML"):
        override(values, ["a=["])


def test_sections_are_made_where_they_are_missing() -> None:
    values: dict[str, Any] = {}
    section(values, ["a", "b"])["c"] = 1
    assert values == {"a": {"b": {"c": 1}}}
    assert section(values, []) is values


@pytest.mark.parametrize("assignment", ["a", "=1", "a="])
def test_assignments_need_two_sides(assignment: str) -> None:
    with pytest.raises(ConfigError, match=r"--set .*: expected KEY=VALUE"):
        split(assignment, "--set", "KEY=VALUE")


def test_rejects_numbers_that_no_count_has() -> None:
    class Counted(Section):
        rows: Positive = setting("a whole number above 0", default=1)
        rate: float = 0.5

    with pytest.raises(ConfigError, match=r"rows: expected up to 2147483647, found 10000000000$"):
        validate(Counted, {"rows": 10**10}, "here")
    with pytest.raises(ConfigError, match=r"rows: expected a whole number above 0, found 0$"):
        validate(Counted, {"rows": 0}, "here")
    for value in (float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"rate: expected a finite number"):
            validate(Counted, {"rate": value}, "here")


def test_an_assignment_is_read_as_strictly() -> None:
    with pytest.raises(ConfigError, match=r"--set a=\[+: expected up to 32 levels, found more"):
        override({}, [f"a={'[' * 500}"])
