import braceexpand
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpu.sources.braces import _count, expand_braces


@pytest.mark.parametrize(
    "pattern",
    [
        "a",
        "a.tar",
        "{000..127}.tar",
        "{a,b}-{c,d,e}",
        "{a,{b,c}{1..3}}x",
        "{1..9..2}",
        "{c..a}",
        r"\{a,b\}",
        "{a}",
        "{,x}",
    ],
)
def test_paths_are_those_of_braceexpand(pattern: str) -> None:
    assert expand_braces(pattern) == list(braceexpand.braceexpand(pattern))


@pytest.mark.parametrize("pattern", ["}{", "}{{,},", "a}{b,c}"])
def test_rejects_a_closing_brace_before_any_opening_one(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"before any `\{`"):
        expand_braces(pattern)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="{},.1a\\", max_size=14))
def test_there_are_never_more_paths_than_counted(pattern: str) -> None:
    try:
        found = expand_braces(pattern)
    except ValueError:
        return
    assert "{" not in pattern or len(found) <= _count(pattern)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("{a,b}" * 40, "expected up to 1,000,000 paths, found 1,099,511,627,776"),
        ("{1..99999999999}.tar", "found 99,999,999,999"),
        ("{{1..1000000},{1..1000000}}", "found 2,000,000"),
        ("{" + "{a,b}" * 40 + ",c}", "expected up to 1,000,000 paths"),
        ("{" * 5000 + "a,b" + "}" * 5000, "expected up to 32 braces within each other"),
        ("{1.." + "9" * 5000 + "}", "4300 digits"),
    ],
)
def test_rejects_braces_that_never_end(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        expand_braces(pattern)
