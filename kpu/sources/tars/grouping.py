"""Which members of a tar are one sample, and which of them are its image and its label.

A member's key is its name up to the first dot of the file name, its ending what follows, as in WebDataset. Members of
one key in one tar are one sample, also where others lie between them. Hidden ones (`._0.jpg`, `.DS_Store`,
`_MACOSX/`) are none.

The image is the member whose ending is among those named; without names the one with an image's ending (`jpg`), else
the one whose ending ends in such (`0.jpg`, `left.jpg`). An ending that elsewhere in the source lies beside an image
(`seg.png`) is not taken for an image. The label is the member with the label's ending (`cls`), else the one that has it
where the image has its own: `0.cls` beside `0.jpg`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from kpu.errors import SourceError
from kpu.records.leftout import HIDDEN, Tally
from kpu.sources.formats import IMAGES, MACOS, extension
from kpu.sources.tars.headers import Member

_LONGEST_LABEL: Final = 64

Part = tuple[str, Member]
"""A member of a sample with its ending, in lower case."""


class Row(NamedTuple):
    """One image. `ending` is what its name has after the key."""

    key: str
    offset: int
    length: int
    label: int | None
    ending: str


class Choice(NamedTuple):
    """The endings of image and label; no image ending is any that an image can have."""

    image: tuple[str, ...]
    label: tuple[str, ...]


def split_name(name: str) -> tuple[str | None, str]:
    """WebDataset's key and extension: up to, and after, the first dot of the file name. No key for hidden files."""
    folder, slash, file = name.rpartition("/")
    stem, dot, rest = file.partition(".")
    return (f"{folder}{slash}{stem}", rest.lower()) if stem and dot else (None, "")


def runs_of(members: Iterable[Member], tally: Tally, tar: str) -> Iterator[tuple[str, list[Part]]]:
    """Keys with their members, as far as these follow one another; what is no part of a sample is counted."""
    current: str | None = None
    parts: list[Part] = []
    for member in members:
        key, ending = split_name(member.name)
        if key is None or (MACOS in key and MACOS in key.split("/")):
            hidden = key is not None or member.name.rpartition("/")[2].startswith(".")
            tally.add(HIDDEN if hidden else "without an ending", f"{tar}/{member.name}")
            continue
        if key != current:
            if current is not None:
                yield current, parts
            current, parts = key, []
        parts.append((ending, member))
    if current is not None:
        yield current, parts


class Samples:
    """The samples of one tar, which messages call `where`.

    `beside` are endings of several parts of images that lie beside a plain one; `alone` those that were taken for
    images for want of a plain one, each with the member's name.
    """

    def __init__(self, where: str, tar: str, choice: Choice) -> None:
        self._where, self._tar, self._choice = where, tar, choice
        self._places: dict[str, int] = {}
        self._without: dict[str, tuple[str, list[Part]]] = {}
        self.rows: list[Row] = []
        self.tally = Tally()
        self.beside: dict[str, str] = {}
        self.alone: dict[str, str] = {}

    def add(self, key: str, parts: list[Part]) -> None:
        """Take members that follow one another, all of one key."""
        image = self._pick_image(parts)
        if image is None:
            first, labels = self._without.get(key, (max(parts, key=lambda part: part[1].length)[1].name, []))
            labels += [part for part in parts if part[0].endswith(self._choice.label)]
            self._without[key] = first, labels
            return
        ending, member = image
        row = Row(key, member.offset, member.length, self._pick_label(parts, ending), ending)
        place = self._places.setdefault(key, len(self.rows))
        if place == len(self.rows):
            self.rows.append(row)
        elif self.rows[place].ending == ending:
            self.rows.append(row)  # the key repeats, which the check of all keys refuses with both places
        else:
            self._join(place, row)

    def finish(self) -> "Samples":
        """Give the labels that lie apart to their images, and count samples that have no image."""
        for key, (name, parts) in self._without.items():
            place = self._places.get(key)
            if place is None:
                self.tally.add("samples without an image", f"{self._tar}/{name}")
            else:
                row = self.rows[place]
                self.rows[place] = self._labelled(row, self._pick_label(parts, row.ending))
        if not self._choice.image:
            self.alone = {row.ending: f"{row.key}.{row.ending}" for row in self.rows if row.ending not in IMAGES}
        self._places, self._without = {}, {}
        return self

    def drop(self, endings: Iterable[str]) -> None:
        """Leave out the rows whose image has one of these endings."""
        endings = frozenset(endings)
        for row in self.rows:
            if row.ending in endings:
                self.tally.add(f"samples with a .{row.ending} but no image", f"{self._tar}/{row.key}.{row.ending}")
        self.rows = [row for row in self.rows if row.ending not in endings]

    def _pick_image(self, parts: list[Part]) -> Part | None:
        if self._choice.image:
            chosen = [part for part in parts if part[0] in self._choice.image]
        else:
            chosen = [part for part in parts if part[0] in IMAGES]
            chosen = chosen or [part for part in parts if extension(part[0]) in IMAGES]
        if len(chosen) > 1:
            self._refuse([f"{member.name!r} at offset {member.offset}" for _, member in chosen])
        if chosen and len(parts) > 1:
            for ending, member in parts:
                if ending != chosen[0][0] and extension(ending) in IMAGES:
                    self._second(ending, member.name)
        return chosen[0] if chosen else None

    def _second(self, ending: str, name: str) -> None:
        self.tally.add("second images of a sample", f"{self._tar}/{name}")
        if ending not in IMAGES:
            self.beside.setdefault(ending, name)

    def _join(self, place: int, row: Row) -> None:
        """Join two parts of a sample that lie apart, each with an image."""
        kept, other = self.rows[place], row
        if not self._choice.image and kept.ending not in IMAGES and row.ending in IMAGES:
            kept, other = row, kept
        if self._choice.image or other.ending in IMAGES or kept.ending not in IMAGES:
            self._refuse([f"'{each.key}.{each.ending}' at offset {each.offset}" for each in (kept, other)])
        self._second(other.ending, f"{other.key}.{other.ending}")
        self.rows[place] = self._labelled(kept, other.label)

    def _labelled(self, row: Row, label: int | None) -> Row:
        if label is None or row.label == label:
            return row
        if row.label is not None:
            raise SourceError(
                f"{self._where}: sample {row.key!r}: expected one label, found {row.label} and {label}, apart from one "
                "another; rename or remove one"
            )
        return row._replace(label=label)

    def _refuse(self, found: Sequence[str]) -> None:
        raise SourceError(
            f"{self._where}: expected one image a sample, found {', '.join(found)}; set data.image to the extension "
            "that counts, or rename one (the key of a sample ends at the first dot)"
        )

    def _pick_label(self, parts: list[Part], image: str) -> int | None:
        for ending, member in parts:
            if ending in self._choice.label:
                return self.number(member)
        infix = image.rpartition(".")[0]
        wanted = {f"{infix}.{name}" for name in self._choice.label} if infix else set()
        return next((self.number(member) for ending, member in parts if ending in wanted), None)

    def number(self, member: Member) -> int:
        """The class number that a member holds. Raises SourceError for anything else."""
        text = member.text() if member.length <= _LONGEST_LABEL else b"..."
        try:
            return int(text)
        except ValueError:
            raise SourceError(
                f"{self._where}: member {member.name!r} at offset {member.offset}: expected a class number, found "
                f"{text[:40]!r}; set data.label to the extension that holds one, or to false to go without labels"
            ) from None
