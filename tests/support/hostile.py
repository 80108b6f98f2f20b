"""Documents changed as a stranger would: one field at a time into something that no writer of ours writes."""

import random
from collections.abc import Iterator
from typing import Any

DEEP: Any = 0
for _ in range(400):
    DEEP = [DEEP]

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 7, 2**31, 2**40, 2**63 - 1, 2**64, -(2**63), 10**4000,
    0.5, -0.0, 1e-308, 1e308, float("nan"), float("inf"), -float("inf"),
    "", "x", "0", "1e999", "../../etc/passwd", "/dev/zero", "a\0b", "\x1b[2J\x1b]0;x\x07", "\ud800",
    "\N{RIGHT-TO-LEFT OVERRIDE}", "9" * 5000, [], {}, [[]], [None], [-1, "x"], {"": {}}, {"x": [1, {"y": None}]},
    DEEP, ["x"] * 2000,
]  # fmt: skip
"""To stand in for any other."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every part of a document, the whole aside."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mangle(document: Any, rng: random.Random) -> str:
    """Change one part of a document in place; what was done, for messages."""
    paths = list(places(document))
    if not paths:
        document["x"] = 1
        return "added x"
    # Every depth alike, or long lists of numbers would take all the changes.
    depth = rng.choice(sorted({len(path) for path in paths}))
    *parents, last = rng.choice([path for path in paths if len(path) == depth])
    owner = document
    for key in parents:
        owner = owner[key]
    kind = rng.random()
    if kind < 0.12:
        del owner[last]
        return f"removed {[*parents, last]}"
    if kind < 0.24 and isinstance(owner, dict):
        owner[rng.choice(["x", "", "../x", "\x1b[31m"])] = rng.choice(VALUES)
        return f"added to {parents}"
    if kind < 0.32 and isinstance(owner[last], int | float) and not isinstance(owner[last], bool):
        owner[last] = owner[last] * rng.choice([-1, 2, 1000, 1 << 20]) + rng.choice([-1, 0, 1])
        return f"changed {[*parents, last]} to {owner[last]}"
    if kind < 0.4 and isinstance(owner[last], list):
        owner[last] = owner[last] * 2 if rng.random() < 0.5 else owner[last][:-1]
        return f"changed the length of {[*parents, last]}"
    number = rng.randrange(len(VALUES))
    owner[last] = VALUES[number]
    return f"set {[*parents, last]} to value {number}"


def mangle_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Change, cut or lengthen a file of any kind."""
    data = bytearray(raw)
    kind = rng.random()
    if kind < 0.15:
        return bytes(data[: rng.randrange(len(data) + 1)])
    if kind < 0.2:
        return rng.choice([b"", b"\0" * 64, b"{}", b"[" * 10_000, b"null", bytes(data * 2)])
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(rng.choice((min(64, len(data)), len(data), len(data)))) if data else 0
        if data:
            data[place] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    return bytes(data)
