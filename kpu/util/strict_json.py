"""The one reader of JSON that came from a file: what our own writers could not have written is refused."""

import json
import math
import re
from typing import Any, Final, NoReturn

MOST_BYTES: Final = 256 << 20
MOST_DEPTH: Final = 64
_INTEGER_BITS: Final = 64
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes | str, *, most_bytes: int = MOST_BYTES) -> Any:
    """Parse JSON of plain values.

    Raises:
        ValueError: no JSON, or JSON with a key given twice, NaN, infinity, an integer of more than 64 bits, half a
            surrogate pair, more than 64 levels, or more than `most_bytes`.
    """
    if len(raw) > most_bytes:
        raise ValueError(f"expected up to {most_bytes:,} bytes, found {len(raw):,}")
    text = raw if isinstance(raw, str) else raw.decode()
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"expected up to {MOST_DEPTH} levels, found more") from None
    _check(value)
    if _SURROGATE.search(text.encode(errors="surrogatepass")):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def parse_json_object(raw: bytes | str, *, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """As `parse_json`, of an object. Raises ValueError for anything else as well."""
    value = parse_json(raw, most_bytes=most_bytes)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"expected each key once, found {twice!r} again")
    return found


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, found {name}")


def _check(value: Any) -> None:
    """Raise ValueError for too many levels and for numbers that no writer of ours has."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, float):
                if not math.isfinite(item):
                    raise ValueError(f"expected finite numbers, found {item}")
            elif isinstance(item, int) and item.bit_length() > _INTEGER_BITS:
                raise ValueError(f"expected integers of up to {_INTEGER_BITS} bits, found one of {item.bit_length()}")
        if not below:
            return
        level = below
    raise ValueError(f"expected up to {MOST_DEPTH} levels, found more")
