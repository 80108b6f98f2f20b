"""Braces in the path of a source, expanded where that gives no absurd number of paths."""

import re
from typing import Final

import braceexpand

MOST_PATHS: Final = 1_000_000
_MOST_DEPTH: Final = 32
_LETTERS: Final = re.compile(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?")
_RANGE: Final = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")


def expand_braces(pattern: str) -> list[str]:
    """The paths that a pattern such as `shard-{000..127}.tar` means; itself if it has no braces.

    Raises:
        ValueError: the braces do not match, or mean more than a million paths.
    """
    if "{" not in pattern:
        return [pattern]
    count = _count(pattern)
    if count > MOST_PATHS:
        raise ValueError(f"expected up to {MOST_PATHS:,} paths, found {count:,}; name a folder, or several patterns")
    return list(braceexpand.braceexpand(pattern))


def _count(pattern: str) -> int:
    """How many paths there will be, at most."""
    # Of each group that is open: where it began, the paths of its alternatives so far, those of the one at hand.
    open_groups: list[tuple[int, int, int]] = []
    begin, before, own = 0, 0, 1
    at = 0
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            at += 1
        elif character == "{":
            open_groups.append((begin, before, own))
            if len(open_groups) > _MOST_DEPTH:
                raise ValueError(f"expected up to {_MOST_DEPTH} braces within each other, found more")
            begin, before, own = at + 1, 0, 1
        elif character == "," and open_groups:
            before, own = before + own, 1
        elif character == "}":
            if not open_groups:
                raise ValueError("expected braces that match, found `}` before any `{`; write \\} for the character")
            inside = max(before + own, _length(pattern[begin:at]))
            begin, before, own = open_groups.pop()
            own *= inside
        at += 1
    return own


def _length(group: str) -> int:
    found = _RANGE.fullmatch(group)
    if not found:
        return 52 if _LETTERS.fullmatch(group) else 1
    first, last, step = (int(part or 1) for part in found.groups())
    return abs(last - first) // max(step, 1) + 1
