"""What a listing leaves out, counted by reason: nothing is passed over without being said."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

HIDDEN: Final = "hidden"
NOT_REGULAR: Final = "neither file nor folder"
OTHERS: Final = "with other endings"
_ENDINGS: Final = 50  # counted apart; names such as `IMG.0001` give as many endings as there are files
_SHOWN: Final = 8
_LONGEST_EXAMPLE: Final = 80


@dataclass(frozen=True)
class LeftOut:
    """`count` files or samples that are no row, for a `reason` that reads on after the count; one `example`."""

    reason: str
    count: int
    example: str


class Tally:
    """Counts what one pass over a source leaves out."""

    def __init__(self, known: Iterable[LeftOut] = ()) -> None:
        self._found: dict[str, tuple[int, str]] = {item.reason: (item.count, item.example) for item in known}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count something; the first `example` of a reason is kept."""
        before, first = self._found.get(reason, (0, example))
        self._found[reason] = before + count, first

    def add_file(self, path: str) -> None:
        """Count a file that is left out for its name."""
        name = path.rpartition("/")[2]
        if name.startswith("."):
            reason = HIDDEN
        else:
            _, dot, ending = name.lower().rpartition(".")
            reason = f"with the ending .{ending}" if dot else "without an ending"
            if reason not in self._found and len(self._found) >= _ENDINGS:
                reason = OTHERS
        self.add(reason, path)

    def merge(self, other: "Tally") -> None:
        """Add the counts of another pass."""
        for reason, (count, example) in other._found.items():
            self.add(reason, example, count)

    def result(self) -> tuple[LeftOut, ...]:
        """All counts, the largest first."""
        found = (LeftOut(reason, count, example) for reason, (count, example) in self._found.items())
        return tuple(sorted(found, key=lambda item: (-item.count, item.reason)))


def describe_left_out(items: Iterable[LeftOut]) -> str:
    """One line: `left out: 3 with the ending .heic (a/b.heic), 1 hidden (.DS_Store)`; empty if nothing was."""
    found = list(items)
    if not found:
        return ""
    parts = [f"{item.count:,} {item.reason} ({_short(item.example)})" for item in found[:_SHOWN]]
    if len(found) > _SHOWN:
        parts.append(f"{sum(item.count for item in found[_SHOWN:]):,} for {len(found) - _SHOWN} other reasons")
    return f"left out: {', '.join(parts)}"


def _short(example: str) -> str:
    text = example if example.isprintable() else repr(example)
    return text if len(text) <= _LONGEST_EXAMPLE else f"...{text[3 - _LONGEST_EXAMPLE :]}"
