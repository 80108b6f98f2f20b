"""WebDataset tars. One scan of the headers gives every image's offset and length; images are then read in place.

What is a sample is said in `kpu.sources.tars.grouping`. Names are keys only: nothing is ever unpacked, so `..` and
absolute names are harmless.
"""

import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Final, Literal

import pyarrow as pa

from kpu.errors import SourceError
from kpu.format.plan import SourceSpec
from kpu.records.leftout import NOT_REGULAR, Tally, describe_left_out
from kpu.sources.files import Files, Piece
from kpu.sources.locate import Located
from kpu.sources.tables import BATCH_ROWS, sample_batch
from kpu.sources.tars.grouping import Choice, Samples, runs_of
from kpu.sources.tars.headers import Member, all_members, is_header_of

_BLOCK: Final = 512
_REMOTE_SCANS: Final = 8
_GAP: Final = 64 * 2**10
_SPAN: Final = 16 * 2**20
_LINKS_FOLLOWED: Final = 8


class TarListing:
    """The samples of some tars, in their order.

    `image` and `label` are the extensions of the image and of its class number (`jpg;png` names alternatives); without
    them an image is known by its extension, and the label is what `.cls` says. A `label` of False leaves labels out.
    """

    unique_keys = False
    classes: tuple[str, ...] | None = None

    def __init__(self, located: Located, image: str | None, label: str | Literal[False] | None) -> None:
        self._located, self._files = located, located.files
        self._tars = [entry.path for entry in located.entries]
        self._choice = Choice(_extensions(image), () if label is False else _extensions(label) or ("cls",))
        self._seen: set[str] = set()
        self.tally = Tally()
        self.spec = SourceSpec(kind="tar", root=self._files.root, options={"image": image, "label": label or None})

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Columns key, file, offset, length and label."""
        tally = self.tally = Tally(self._located.left_out)
        beside: dict[str, str] = {}
        alone: dict[str, str] = {}
        for tar, samples in self._scans():
            self._take_images(tar, samples, beside, alone)
            tally.merge(samples.tally)
            shard = tar.removesuffix(".tar")
            for start in range(0, len(samples.rows), BATCH_ROWS):
                part = samples.rows[start : start + BATCH_ROWS]
                keys, offsets, lengths, labels, _ = (list(column) for column in zip(*part, strict=True))
                address = [pa.array([tar] * len(part)), pa.array(offsets, pa.int64()), pa.array(lengths, pa.int64())]
                names = pa.array([f"{shard}/{key}" for key in keys], pa.string())
                yield sample_batch("tar", names, address, pa.array(labels, pa.int64()))

    def nothing(self) -> str:
        """What to say where there is no image."""
        expected = " or ".join(f".{name}" for name in self._choice.image) or "an image extension"
        found = describe_left_out(self.tally.result())
        return f"{self._hold_none(expected)} (data.image); found {self._found()}" + (f"; {found}" if found else "")

    def unlabelled(self) -> str:
        """What to say where no image has a label."""
        expected = " or ".join(f".{name}" for name in self._choice.label)
        return (
            f"{self._hold_none(expected)} (data.label) beside an image; found {self._found()}: name the one that holds "
            "class numbers, or set data.label: false to go without labels"
        )

    def _hold_none(self, expected: str) -> str:
        return f"{self._files.root}: {len(self._tars)} tars hold no member with {expected}"

    def _found(self) -> str:
        return ", ".join(f".{name}" for name in sorted(self._seen)[:20]) or "no members"

    def _take_images(self, tar: str, samples: Samples, beside: dict[str, str], alone: dict[str, str]) -> None:
        """Leave out what is the second image of other samples; `beside` and `alone` are of the tars before.

        Raises:
            SourceError: an ending is beside the image here, and was taken for the image in a tar before.
        """
        beside |= samples.beside
        for ending in samples.beside.keys() & alone.keys():
            raise SourceError(
                f"{self._files.name(tar)}: expected one ending of images in all tars, found {samples.beside[ending]!r} "
                f"beside the image of its sample, and {alone[ending]!r} as the only image of another one; set "
                "data.image to the endings of the images, such as jpg;png"
            )
        if samples.alone:
            samples.drop(samples.alone.keys() & beside.keys())
            left = samples.alone.keys() - beside.keys()
            alone |= {ending: f"{tar}/{samples.alone[ending]}" for ending in left}

    def _scans(self) -> Iterator[tuple[str, Samples]]:
        if self._files.local:
            yield from ((tar, self._scan(tar)) for tar in self._tars)
            return
        with ThreadPoolExecutor(_REMOTE_SCANS) as pool:  # each waits for the network most of the time
            tars = iter(self._tars)
            pending = [(tar, pool.submit(self._scan, tar)) for tar in islice(tars, _REMOTE_SCANS)]
            try:
                while pending:
                    tar, scan = pending.pop(0)
                    samples = scan.result()
                    pending += [(tar, pool.submit(self._scan, tar)) for tar in islice(tars, 1)]
                    yield tar, samples
            finally:
                for _, scan in pending:
                    scan.cancel()

    def _scan(self, tar: str) -> Samples:
        samples = Samples(self._files.name(tar), tar, self._choice)
        for key, parts in runs_of(self._followed(tar, samples.tally), samples.tally, tar):
            if len(self._seen) < 100:
                self._seen.update(ending for ending, _ in parts)
            samples.add(key, parts)
        return samples.finish()

    def _followed(self, tar: str, tally: Tally) -> Iterator[Member]:
        """Regular files, and links to them under the links' names; what else there is is counted."""
        named: dict[str, Member] = {}
        for member in all_members(self._files, tar):
            if member.kind == b"0":
                yield member
                continue
            if member.kind not in b"12":
                tally.add(NOT_REGULAR, f"{tar}/{member.name}")
                continue
            if not named:
                named = {posixpath.normpath(each.name): each for each in all_members(self._files, tar)}
            target = _target(member, named)
            if target is None:
                tally.add("links to nothing in the tar", f"{tar}/{member.name}")
            else:
                yield target._replace(name=member.name)


def _target(link: Member, named: dict[str, Member]) -> Member | None:
    """The regular file that a link leads to; None if there is none in the tar."""
    found: Member | None = link
    for _ in range(_LINKS_FOLLOWED):
        if found is None or found.kind == b"0":
            return found
        folder = posixpath.dirname(found.name) if found.kind == b"2" else ""
        found = named.get(posixpath.normpath(posixpath.join(folder, found.target)))
    return None


def _extensions(option: str | None) -> tuple[str, ...]:
    return tuple(part.strip().lstrip(".").lower() for part in (option or "").split(";") if part.strip(" ."))


class TarReader:
    """Reads members in place. Neighbours in one tar are read together."""

    def __init__(self, spec: SourceSpec) -> None:
        self._files = Files(spec.root)

    def read(self, table: pa.Table) -> list[bytes]:
        """Encoded bytes of each row, in order.

        Each member's own header is read with it and checked, so that a tar which was rewritten since planning is an
        error rather than another image.

        Raises:
            SourceError: a tar is gone, unreadable, shorter than planned, or has other members than planned.
        """
        columns = ("file", "offset", "length", "key")
        rows = list(zip(*(table[name].to_pylist() for name in columns), strict=True))
        spans = list(_spans(rows))
        pieces = [Piece(file, rows[inside[0]][3], start, stop - start) for file, start, stop, inside in spans]
        result: list[bytes] = [b""] * len(rows)
        for data, (file, start, _, inside) in zip(self._files.fetch(pieces), spans, strict=True):
            for row in inside:
                _, offset, length, key = rows[row]
                at = offset - start
                if not is_header_of(data[at - _BLOCK : at], length):
                    raise SourceError(
                        f"{self._files.name(file)} (key {key!r}): expected a member of {length} bytes at offset "
                        f"{offset}, found something else: the tar was rewritten since it was listed; restore it"
                    )
                result[row] = data[at : at + length]
        return result


def _spans(rows: list[tuple[Any, ...]]) -> Iterator[tuple[str, int, int, list[int]]]:
    """Ranges (file, start, stop, rows) to read at once: near neighbours are joined, headers included."""
    file, start, stop, inside = "", 0, -1, list[int]()
    for row in sorted(range(len(rows)), key=lambda row: rows[row][:2]):
        name, offset, length, _ = rows[row]
        first, last = offset - _BLOCK, offset + length
        if name == file and first - stop <= _GAP and last - start <= _SPAN:
            stop = max(stop, last)
            inside.append(row)
            continue
        if inside:
            yield file, start, stop, inside
        file, start, stop, inside = name, first, last, [row]
    if inside:
        yield file, start, stop, inside
