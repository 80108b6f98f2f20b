import datetime

import pytest

from kpu.config.strict_yaml import MOST_DEPTH, MOST_NODES, parse_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 25))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("a: [", "^is not YAML: "),
        ("a: \x00", "^is not YAML: "),
        (b"a: \xff", "^is not YAML: .*utf-8"),
        ("a: 2001-99-99", "^is not YAML: month"),
        ("a: !!int ''", "^is not YAML: "),
        ("a: !!timestamp x", "^is not YAML: "),
        ("a: !!bool x", "^is not YAML: "),
        ("a: " + "1:" * 300 + "1.5", "^is not YAML: "),
        ("a: " + "1" * 5000, "^is not YAML: .*4300 digits"),
        ("a: !!python/object/apply:os.system [true]", "^is not YAML: could not determine a constructor"),
        ("a: 1\nb: {c: 1, c: 2}\n", "^line 2: expected each key once, found 'c' again"),
        ("a: 0x" + "f" * 100_000, "expected numbers of up to 64 bits, found one of 400000"),
        ("a: &a [*a]", f"expected up to {MOST_DEPTH} levels"),
        ("[" * (MOST_DEPTH + 2) + "]" * (MOST_DEPTH + 2), f"expected up to {MOST_DEPTH} levels"),
        ("[" * 50_000, f"expected up to {MOST_DEPTH} levels"),
        (BOMB, f"expected up to {MOST_NODES:,} values, found more; repeat less with anchors"),
        (MERGED, "expected up to"),
        ("a" * (1 << 20), "expected up to 524,288 bytes, found 1,048,576"),
    ],
)
@pytest.mark.timeout(120)
def test_rejects_what_no_configuration_needs(raw: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_yaml(raw)


def test_anchors_repeat_a_part() -> None:
    text = "a: &a {x: 1, y: [2, 3.5, .inf]}\nb: {<<: *a, x: 2}\nc: [*a, *a]\nd: 2026-01-31\n"
    shared = {"x": 1, "y": [2, 3.5, float("inf")]}
    assert parse_yaml(text) == {
        "a": shared, "b": {**shared, "x": 2}, "c": [shared, shared], "d": datetime.date(2026, 1, 31),
    }  # fmt: skip
    assert parse_yaml("") is None
    assert parse_yaml(b"# nothing\n") is None
