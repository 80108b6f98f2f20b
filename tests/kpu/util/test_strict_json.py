import json

import pytest

from kpu.util.strict_json import MOST_DEPTH, parse_json, parse_json_object


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff", "utf-8"),
        (b'"\xed\xa0\x80"', "utf-8"),
        (b"NaN", "expected finite numbers, found NaN"),
        (b"[-Infinity]", "expected finite numbers, found -Infinity"),
        (b"[1e999]", "expected finite numbers, found inf"),
        (b'{"a": 1, "b": 2, "a": 3}', "expected each key once, found 'a' again"),
        (rb'{"a": "\ud800"}', "surrogates not allowed"),
        (rb'{"\uDFFF": 1}', "surrogates not allowed"),
        (b"[" * (MOST_DEPTH + 2) + b"]" * (MOST_DEPTH + 2), "expected up to 64 levels"),
        (b"[" * 1_000_000, "expected up to 64 levels"),
        (b'{"a":' * 200_000, "expected up to 64 levels"),
        (str(2**64).encode(), "expected integers of up to 64 bits"),
        (b"1" * 5000, "4300 digits"),
        (b" " * 101, "expected up to 100 bytes, found 101"),
    ],
)
def test_rejects_what_no_writer_of_ours_writes(raw: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(raw, most_bytes=100 if raw.startswith(b" ") else 10**9)


def test_anything_else_is_as_json_has_it() -> None:
    value = {"a": [1, -1.5, None, True, 2**63, "\N{GRINNING FACE} \x1b"], "": {}, "deep": [[[]]]}
    for raw in (json.dumps(value), json.dumps(value).encode(), json.dumps(value, ensure_ascii=False)):
        assert parse_json(raw) == value
    deepest = b"[" * MOST_DEPTH + b"]" * MOST_DEPTH
    assert json.dumps(parse_json(deepest)).encode() == deepest


@pytest.mark.parametrize("raw", [b"[]", b"1", b'"a"', b"null"])
def test_an_object_is_asked_for(raw: bytes) -> None:
    with pytest.raises(ValueError, match="expected an object, found"):
        parse_json_object(raw)
