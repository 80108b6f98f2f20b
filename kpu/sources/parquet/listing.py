"""Parquet files with a column of encoded images: Hugging Face's struct<bytes, path>, or plain binary."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kpu.errors import SourceError
from kpu.format.plan import SourceSpec
from kpu.records.leftout import Tally
from kpu.sources.files import Files, Piece, require_regular, to_bytes
from kpu.sources.locate import Located
from kpu.sources.parquet.image_column import image_column, no_column, rows_without_bytes
from kpu.sources.tables import BATCH_ROWS, sample_batch
from kpu.util.strict_json import parse_json

_INTEGERS: Final = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)


class ParquetListing:
    """The rows of some Parquet files, in order; no image is read.

    `image`, `label`, `key` name columns; without them the image column is found by its type, `label` is taken where
    there is one, and a row's key is `<file without extension>:<row>`. A `label` of False leaves labels out.
    """

    def __init__(
        self, located: Located, image: str | None, label: str | Literal[False] | None, key: str | None
    ) -> None:
        self._files, self.tally = located.files, Tally(located.left_out)
        self._entries = [entry.path for entry in located.entries]
        self._label, self._key = label, key
        self._without_bytes = 0
        first = open_parquet(self._files, self._entries[0])
        self._image = image_column(first.schema_arrow, self._files.name(self._entries[0]), image)
        self._classes_of_first = _classes(first.schema_arrow, self._label_column(first, self._entries[0]))
        options = {"image": self._image, "label": label or None, "key": key}
        self.spec = SourceSpec(kind="parquet", root=self._files.root, options=options)

    @cached_property
    def unique_keys(self) -> bool:
        """Whether keys cannot repeat: they hold the row's number, so it is enough that no two files share a stem."""
        return self._key is None and len({_stem(file) for file in self._entries}) == len(self._entries)

    @property
    def notes(self) -> list[str]:
        """What to say of how the last listing's images are read."""
        if not self._without_bytes:
            return []
        return [
            f"{self._without_bytes:,} rows of column {self._image!r} have no bytes: where they have a path, the image "
            f"is read from it, below {self._files.root}"
        ]

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names from the files' metadata."""
        return self._classes_of_first

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Columns key, file, row_group, row (within its row group) and label."""
        self._without_bytes = 0
        for file in self._entries:
            opened = open_parquet(self._files, file)
            image_column(opened.schema_arrow, self._files.name(file), self._image)
            self._without_bytes += rows_without_bytes(opened, self._image)
            label = self._label_column(opened, file)
            if _classes(opened.schema_arrow, label) != self._classes_of_first:
                raise SourceError(
                    f"{self._files.name(file)}: its metadata names other classes than {self._entries[0]}; "
                    "a label must mean the same in every file: extract them apart"
                )
            yield from self._file(file, opened, label)

    def nothing(self) -> str:
        """What to say where there is no row."""
        return f"{self._files.root}: {len(self._entries)} Parquet files hold no row"

    def unlabelled(self) -> str:
        """What to say where no row has a label."""
        return (
            f"{self._files.root}: column {self._label!r} (data.label): expected a class number in some row, found none "
            "(null, or below 0, in every row); name another column, or set data.label: false to go without labels"
        )

    def _file(self, file: str, opened: pq.ParquetFile, label: str | None) -> Iterator[pa.RecordBatch]:
        metadata = opened.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        ends = np.cumsum(sizes, dtype=np.int64)
        begin = 0
        for columns in self._columns(file, opened, label):
            length = columns.num_rows
            rows = np.arange(begin, begin + length)
            groups = np.searchsorted(ends, rows, side="right")
            within = rows - np.concatenate([[0], ends])[groups]
            address = [pa.repeat(pa.scalar(file), length), pa.array(groups, pa.int32()), pa.array(within, pa.int32())]
            if self._key is None:
                keys = pc.binary_join_element_wise(_stem(file), pa.array(rows).cast(pa.string()), ":")
            else:
                keys = self._keys(file, columns.column(self._key), begin)
            labels = pa.nulls(length, pa.int64())
            if label is not None:
                wanted = f"{label!r} (data.label)", "integers of 64 bits with a sign"
                labels = self._cast(file, columns.column(label), pa.int64(), *wanted)
            yield sample_batch("parquet", keys, address, labels)
            begin += length

    def _columns(self, file: str, opened: pq.ParquetFile, label: str | None) -> Iterator[pa.RecordBatch]:
        """The label and key columns, in batches; batches without columns where neither is wanted."""
        wanted = [name for name in (label, self._key) if name is not None]
        if self._key is not None and self._key not in opened.schema_arrow.names:
            raise no_column(self._files.name(file), "data.key", self._key, opened.schema_arrow)
        if not wanted:
            for begin in range(0, opened.metadata.num_rows, BATCH_ROWS):
                rows = min(BATCH_ROWS, opened.metadata.num_rows - begin)
                yield pa.RecordBatch.from_arrays([pa.nulls(rows)], ["none"])
            return
        try:
            yield from opened.iter_batches(BATCH_ROWS, columns=list(dict.fromkeys(wanted)), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise self._files.failure(Piece(file, file), error) from error

    def _keys(self, file: str, column: pa.Array, begin: int) -> pa.Array:
        if column.null_count:
            row = begin + int(np.flatnonzero(np.asarray(column.is_null()))[0])
            raise SourceError(
                f"{self._files.name(file)}: column {self._key!r} (data.key) is null in row {row}; every row needs a key"
            )
        return self._cast(file, column, pa.string(), f"{self._key!r} (data.key)", "text in UTF-8, or numbers")

    def _cast(self, file: str, column: pa.Array, kind: pa.DataType, name: str, expected: str) -> pa.Array:
        """A column as `kind`; `name` and `expected` are for the message where it cannot be."""
        try:
            return column.cast(kind)
        except pa.ArrowException as error:
            found = f"found {column.type} ({str(error).partition(chr(10))[0]})"
            raise SourceError(
                f"{self._files.name(file)}: column {name}: expected {expected}, {found}; name another column, or "
                "write this one anew"
            ) from None

    def _label_column(self, opened: pq.ParquetFile, file: str) -> str | None:
        schema = opened.schema_arrow
        name = self._label or "label"
        if self._label is False or (self._label is None and name not in schema.names):
            return None
        if name not in schema.names:
            raise no_column(self._files.name(file), "data.label", name, schema)
        found = schema.field(name).type
        if not any(check(found) for check in _INTEGERS):
            raise SourceError(
                f"{self._files.name(file)}: column {name!r} (data.label): expected integers, the numbers of the "
                f"classes, found {found}; write them as such, name another column, or set data.label: false to go "
                "without labels"
            )
        return name


def open_parquet(files: Files, file: str, key: str | None = None) -> pq.ParquetFile:
    """Open one file and read its footer; `key` is of the row wanted from it, for messages.

    Raises:
        SourceError: it is gone, unreadable or no Parquet file.
    """
    return files.retry(lambda: _open(files, file), Piece(file, key or file))


def _open(files: Files, file: str) -> pq.ParquetFile:
    path = files.path(file)
    if files.local:
        require_regular(to_bytes(path))
    # Buffered streams, not whole column chunks: a row group may be larger than memory.
    source = pa.OSFile(to_bytes(path)) if files.local else files.system[0].open(path, "rb")
    return pq.ParquetFile(source, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True)


def _stem(file: str) -> str:
    return file.rpartition(".")[0]


def _classes(schema: pa.Schema, label: str | None) -> tuple[str, ...] | None:
    """Class names: `class_names` of the schema's metadata, or those of Hugging Face's ClassLabel."""
    metadata: dict[bytes, bytes] = schema.metadata or {}
    if b"class_names" in metadata:
        return tuple(name.strip() for name in metadata[b"class_names"].decode("utf-8", "replace").split(","))
    try:
        features: Any = parse_json(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        names = features[label]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None
