"""WebDataset tars. One scan of the headers gives every image's offset and length; images are then read in place.

Members whose names are equal up to the first dot of the file name, and which follow one another, are one sample. Names
are keys only: nothing is ever unpacked, so `..` and absolute names are harmless.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from typing import Any, Final, Literal, NamedTuple

import pyarrow as pa

from cache.errors import SourceError
from cache.sources.files import Files, Piece
from cache.sources.headers import Member, is_header_of, members
from cache.sources.locate import IMAGES, Located, extension
from cache.sources.tables import BATCH_ROWS, sample_batch
from cache.spec import SourceSpec

_BLOCK: Final = 512
_REMOTE_SCANS: Final = 8
_GAP: Final = 64 * 2**10
_SPAN: Final = 16 * 2**20


class _Sample(NamedTuple):
    key: str
    offset: int
    length: int
    label: int | None


class TarListing:
    """The samples of some tars, in their order.

    `image` and `label` are the extensions of the image and of its class number (`jpg;png` names alternatives); without
    them an image is known by its extension, and the label is what `.cls` says. A `label` of False leaves labels out.
    """

    unique_keys = False
    classes: tuple[str, ...] | None = None

    def __init__(self, located: Located, image: str | None, label: str | Literal[False] | None) -> None:
        self._files = located.files
        self._tars = [entry.path for entry in located.entries]
        self._image = _extensions(image)
        self._label = () if label is False else _extensions(label) or ("cls",)
        self._seen: set[str] = set()
        self.spec = SourceSpec(kind="tar", root=self._files.root, options={"image": image, "label": label or None})

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Columns key, file, offset, length and label."""
        for tar, samples in self._scans():
            for start in range(0, len(samples), BATCH_ROWS):
                part = samples[start : start + BATCH_ROWS]
                keys, offsets, lengths, labels = (list(column) for column in zip(*part, strict=True))
                address = [pa.array([tar] * len(part)), pa.array(offsets, pa.int64()), pa.array(lengths, pa.int64())]
                yield sample_batch("tar", pa.array(keys, pa.string()), address, pa.array(labels, pa.int64()))

    def nothing(self) -> str:
        """What to say where there is no image."""
        expected = " or ".join(f".{name}" for name in self._image) or "an image extension"
        return f"{self._hold_none(expected)} (data.image); found {self._found()}"

    def unlabelled(self) -> str:
        """What to say where no image has a label."""
        expected = " or ".join(f".{name}" for name in self._label)
        return (
            f"{self._hold_none(expected)} (data.label) beside an image; found {self._found()}: name the one that holds "
            "class numbers, or set data.label: false to go without labels"
        )

    def _hold_none(self, expected: str) -> str:
        return f"{self._files.root}: {len(self._tars)} tars hold no member with {expected}"

    def _found(self) -> str:
        return ", ".join(f".{name}" for name in sorted(self._seen)[:20]) or "no members"

    def _scans(self) -> Iterator[tuple[str, list[_Sample]]]:
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

    def _scan(self, tar: str) -> list[_Sample]:
        shard = tar.removesuffix(".tar")
        samples = []
        for key, group in groupby(members(self._files, tar), key=lambda member: split_name(member.name)[0]):
            parts = list(group)
            if key is None:
                continue
            image = self._pick_image(tar, parts)
            if image is not None:
                samples.append(_Sample(f"{shard}/{key}", image.offset, image.length, self._pick_label(tar, parts)))
        return samples

    def _pick_image(self, tar: str, parts: list[Member]) -> Member | None:
        names = [split_name(part.name)[1] for part in parts]
        self._seen.update(names if len(self._seen) < 100 else ())
        if self._image:
            chosen = [part for part, name in zip(parts, names, strict=True) if name in self._image]
        else:
            chosen = [part for part, name in zip(parts, names, strict=True) if name in IMAGES]
            chosen = chosen or [part for part in parts if extension(part.name) in IMAGES]
        if len(chosen) > 1:
            where = ", ".join(f"{part.name!r} at offset {part.offset}" for part in chosen)
            raise SourceError(
                f"{self._files.name(tar)}: expected one image a sample, found {where}; "
                "set data.image to the extension that counts, or rename one"
            )
        return chosen[0] if chosen else None

    def _pick_label(self, tar: str, parts: list[Member]) -> int | None:
        for part in parts:
            if split_name(part.name)[1] in self._label:
                text = part.text() if part.length <= 64 else b"..."
                try:
                    return int(text)
                except ValueError:
                    raise SourceError(
                        f"{self._files.name(tar)}: member {part.name!r} at offset {part.offset}: expected a class "
                        f"number, found {text[:40]!r}; set data.label to the extension that holds one, or to false to "
                        "go without labels"
                    ) from None
        return None


def _extensions(option: str | None) -> tuple[str, ...]:
    return tuple(part.strip().lstrip(".").lower() for part in (option or "").split(";") if part.strip(" ."))


def split_name(name: str) -> tuple[str | None, str]:
    """WebDataset's key and extension: up to, and after, the first dot of the file name. No key for hidden files."""
    folder, slash, file = name.rpartition("/")
    stem, dot, rest = file.partition(".")
    return (f"{folder}{slash}{stem}", rest.lower()) if stem and dot else (None, "")


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
