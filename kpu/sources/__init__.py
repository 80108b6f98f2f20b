"""Where images come from: folders, WebDataset tars and Parquet files, local or on any file system of fsspec.

A source is listed once, in a stable order and without opening an image; a reader then fetches encoded images by the
addresses that the listing gave.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from kpu.errors import ConfigError, SourceError
from kpu.format.plan import SourceSpec
from kpu.records.leftout import LeftOut, Tally, describe_left_out
from kpu.sources.folder import FolderListing, FolderReader
from kpu.sources.keys import unique_keys
from kpu.sources.locate import locate
from kpu.sources.parquet.listing import ParquetListing
from kpu.sources.parquet.row_groups import ParquetReader
from kpu.sources.tars.earlier import EarlierFolderListing, EarlierTarListing
from kpu.sources.tars.listing import TarListing, TarReader

__all__ = ["Data", "ImageSource", "LeftOut", "SourceReader", "describe_left_out", "open_source", "source_reader"]


class Data(Protocol):
    """The part of the configuration that names a source."""

    @property
    def source(self) -> str | Sequence[str]: ...
    @property
    def image(self) -> str | None: ...
    @property
    def label(self) -> str | Literal[False] | None: ...
    @property
    def key(self) -> str | None: ...
    @property
    def limit(self) -> int | None: ...


class ImageSource(Protocol):
    """A listing of samples. `spec` is enough to read them again; `classes` names the labels, where the source does.

    `left_out` counts what the last whole listing passed over; `notes` are lines on how its images are read. `earlier`
    lists by the rules of earlier releases, for a cache that was begun then; None if they were the same.
    """

    spec: SourceSpec
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    earlier: "ImageSource | None"

    @property
    def classes(self) -> tuple[str, ...] | None: ...

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Samples in a stable order: columns key, those of the address, label (see `kpu.records.samples`).

        Raises:
            SourceError: while iterating: nothing found, something unreadable or malformed, or, at the end, a
                duplicate key, or no label where the configuration names where they are.
        """
        ...


class SourceReader(Protocol):
    """Fetches encoded images. Safe to use from several threads; may be pickled."""

    def read(self, table: pa.Table) -> list[bytes]:
        """The encoded bytes of each row of a sample table, in order; b"" if the source has none.

        A read that fails for a reason that may pass is tried again, with pauses.

        Raises:
            SourceError: naming key and file, where a row cannot be read.
        """
        ...


class _Listing(Protocol):
    spec: SourceSpec
    tally: Tally

    @property
    def classes(self) -> tuple[str, ...] | None: ...
    @property
    def unique_keys(self) -> bool: ...
    def rows(self) -> Iterator[pa.RecordBatch]: ...
    def nothing(self) -> str: ...


def open_source(data: Data) -> ImageSource:
    """Find what `data` names and see what kind of source it is.

    Raises:
        SourceError: it does not exist, mixes kinds, or (Parquet) lacks a column or has another type of it.
        ConfigError: an option that this kind of source has no use for.
    """
    located = locate(data.source)
    if located.kind == "folder":
        _refuse(data, "a folder of images", "image", "label", "key")
        return _Checked(FolderListing(located), data.limit, earlier=EarlierFolderListing(located))
    if located.kind == "tar":
        _refuse(data, "tars", "key")
        tars = TarListing(located, data.image, data.label)
        earlier = EarlierTarListing(located, data.image, data.label)
        return _Checked(tars, data.limit, tars.unlabelled if data.label else None, earlier)
    tables = ParquetListing(located, data.image, data.label, data.key)
    return _Checked(tables, data.limit, tables.unlabelled if data.label else None)


def source_reader(spec: SourceSpec) -> SourceReader:
    """A reader of the images that a source listed; nothing is opened before the first read."""
    return _READERS[spec.kind](spec)


_READERS: Final[dict[str, Callable[[SourceSpec], SourceReader]]] = {
    "folder": FolderReader,
    "tar": TarReader,
    "parquet": ParquetReader,
}


class _Checked:
    """A listing cut to `limit` rows, with unique keys and at least one row.

    `unlabelled` is given where labels were asked for by name: what to say where no row has one.
    """

    def __init__(
        self,
        listing: _Listing,
        limit: int | None,
        unlabelled: Callable[[], str] | None = None,
        earlier: _Listing | None = None,
    ) -> None:
        self._listing, self._limit, self._unlabelled = listing, limit, unlabelled
        self.spec = listing.spec
        self.left_out: tuple[LeftOut, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.earlier: ImageSource | None = None if earlier is None else _Checked(earlier, limit)

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self._listing.classes

    def batches(self) -> Iterator[pa.RecordBatch]:
        batches = self._limited() if self._listing.unique_keys else unique_keys(self._limited)
        first = next(batches, None)
        if first is None:
            raise SourceError(f"data.source: nothing to extract: {self._listing.nothing()}")
        labelled = False
        for batch in itertools.chain([first], batches):
            labelled = labelled or _has_label(batch.column("label"))
            yield batch
        self.left_out = self._listing.tally.result()
        self.notes = tuple(getattr(self._listing, "notes", ()))
        if self._unlabelled is not None and not labelled:
            raise SourceError(self._unlabelled())

    def _limited(self) -> Iterator[pa.RecordBatch]:
        left = self._limit
        for batch in self._listing.rows():
            if left is not None:
                batch = batch.slice(0, left)
                left -= batch.num_rows
            if batch.num_rows:
                yield batch
            if left == 0:
                return


def _has_label(labels: pa.Array) -> bool:
    """Whether some label is a class number; those below 0 mean none."""
    largest = pc.max(labels).as_py()
    return largest is not None and largest >= 0


def _refuse(data: Data, kind: str, *options: str) -> None:
    for option in options:
        if getattr(data, option) is not None:
            raise ConfigError(
                f"data.{option}: expected null, found {getattr(data, option)!r}: the source is {kind}, "
                "which has no use for it"
            )
