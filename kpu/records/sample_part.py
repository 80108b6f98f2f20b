"""One Parquet file of the sample table, read without believing what it says of itself."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kpu.errors import CorruptError

_THRIFT_BYTES: Final = 64 << 20
_THRIFT_ITEMS: Final = 1 << 20
_TEXT_BYTES: Final = 16 << 10  # of one key or path, on average
_DICTIONARY: Final = "RLE_DICTIONARY"
_DRAWS: Final = 5


def read_part(
    raw: bytes, file: str, schema: pa.Schema, rows: range, views: int, columns: Sequence[str] | None = None
) -> pa.Table:
    """The columns of one file of the sample table, or some of them.

    Args:
        raw: the bytes of the file.
        file: its name, for messages.
        schema: of the whole table.
        rows: their numbers.
        views: of each sample.
        columns: which; all without.

    Raises:
        CorruptError: it is no Parquet file, has other columns or another number of rows, or values that make no sense.
    """
    try:
        parquet = _open(raw, [])
        _check_shape(parquet, file, schema, len(rows))
        texts = _in_dictionaries(parquet.metadata, schema, columns)
        wanted = None if columns is None else list(columns)
        # Threads of Arrow that outlive the read may abort the process at its exit.
        table = (_open(raw, texts) if texts else parquet).read(columns=wanted, use_threads=False)
        for text in texts:
            place = table.schema.get_field_index(text)
            table = table.set_column(place, schema.field(text), _plain_text(table[text], file))
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:  # the second is what Arrow calls a damaged file
        raise CorruptError(file, f"is not a readable Parquet file ({error})") from None
    expected = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    if table.num_rows != len(rows) or not table.schema.equals(expected):
        raise _other_rows(file, expected, len(rows), table.num_rows, table.schema)
    for problem in filter(None, (_problem(table, name, rows, views) for name in table.column_names)):
        raise CorruptError(file, problem)
    return table


def _open(raw: bytes, dictionaries: list[str]) -> pq.ParquetFile:
    return pq.ParquetFile(
        pa.BufferReader(raw),
        pre_buffer=False,
        read_dictionary=dictionaries,
        thrift_string_size_limit=_THRIFT_BYTES,
        thrift_container_size_limit=_THRIFT_ITEMS,
    )


def _check_shape(parquet: pq.ParquetFile, file: str, schema: pa.Schema, rows: int) -> None:
    found, metadata = parquet.schema_arrow, parquet.metadata
    groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if metadata.num_rows != rows or sum(groups) != rows or min(groups, default=0) < 1 or not found.equals(schema):
        raise _other_rows(file, schema, rows, metadata.num_rows, found)
    for group in range(metadata.num_row_groups):  # a few bytes of a page may stand for any number of equal values
        _check_counts(metadata.row_group(group), file, schema)


def _check_counts(group: Any, file: str, schema: pa.Schema) -> None:
    """See, before any page is decoded, that a row group has as many values as its rows can hold."""
    for index in range(group.num_columns):
        column = group.column(index)
        name = schema.field(index).name
        most = group.num_rows * (_DRAWS if name == "draws" else 1)
        if column.num_values > most:
            raise CorruptError(
                file, f"{name}: expected up to {most:,} values in {group.num_rows:,} rows, found {column.num_values:,}"
            )


def _other_rows(file: str, schema: pa.Schema, rows: int, found: int, columns: pa.Schema) -> CorruptError:
    fields = [f"{field.name} {field.type}" for field in columns]
    return CorruptError(file, f"expected {rows} rows of {schema.names}, found {found} of {fields}")


def _in_dictionaries(metadata: Any, schema: pa.Schema, columns: Sequence[str] | None) -> list[str]:
    """Columns of text in dictionaries, where a small file may hold any number of copies of a long one."""
    texts = [f.name for f in schema if pa.types.is_string(f.type) and (columns is None or f.name in columns)]
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]

    def may_swell(text: str) -> bool:
        chunks = [(group.num_rows, group.column(schema.get_field_index(text))) for group in groups]
        coded = [rows * chunk.total_uncompressed_size for rows, chunk in chunks if _DICTIONARY in chunk.encodings]
        return bool(sum(coded) > _limit(metadata.num_rows))

    return [text for text in texts if may_swell(text)]


def _limit(rows: int) -> int:
    return _TEXT_BYTES * max(64, rows)


def _plain_text(column: pa.ChunkedArray, file: str) -> pa.ChunkedArray:
    limit = _limit(len(column))
    length = sum(
        int(np.asarray(pc.binary_length(chunk.dictionary), np.int64)[np.asarray(chunk.indices)].sum())
        for chunk in column.chunks
        if len(chunk)
    )
    if length > limit:
        raise CorruptError(file, f"expected up to {limit:,} bytes of text for {len(column)} rows, found {length:,}")
    return column.cast(pa.string())


def _problem(table: pa.Table, name: str, rows: range, views: int) -> str | None:
    """What is wrong with the values of a column."""
    column = table[name]
    if name == "view":
        if not np.array_equal(column.to_numpy(), np.arange(rows.start, rows.stop) % views):
            return f"view: expected the numbers from 0 to {views - 1} in turn, found others"
    elif name in ("offset", "length", "row_group", "row"):
        lowest = pc.min(column).as_py()
        if lowest < 0:
            return f"{name}: expected numbers from 0, found {lowest}"
    elif name == "draws":
        lengths = set(pc.unique(pc.list_value_length(column)).to_pylist())
        values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        if lengths - {None, _DRAWS} or not ((values >= 0) & (values < 1)).all():
            return f"draws: expected null or {_DRAWS} numbers from 0, below 1, found others"
    return None
