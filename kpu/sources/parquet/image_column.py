"""The column of a Parquet file that holds encoded images: Hugging Face's struct<bytes, path>, or plain binary."""

import pyarrow as pa
import pyarrow.parquet as pq

from kpu.errors import SourceError


def image_column(schema: pa.Schema, file: str, wanted: str | None) -> str:
    """Name of the column of encoded images: the one wanted, or the only one, or `image`, of a type that can be one."""
    able = [field.name for field in schema if _leaf(field) is not None]
    if wanted is not None:
        if wanted in able:
            return wanted
        if wanted in schema.names:
            found = schema.field(wanted).type
            raise SourceError(
                f"{file}: column {wanted!r} (data.image): expected binary or struct<bytes, path>, found {found}"
            )
        raise no_column(file, "data.image", wanted, schema)
    if len(able) == 1 or "image" in able:
        return able[0] if len(able) == 1 else "image"
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    found = f"several: {', '.join(able)}" if able else f"none among the columns {columns}"
    raise SourceError(
        f"{file}: expected one column of images (binary or struct<bytes, path>), found {found}; set data.image"
    )


def image_leaves(schema: pa.Schema, column: str) -> list[str]:
    """The Parquet paths of the bytes and, if there is one, of the path in their place; no other is read."""
    field = schema.field(column)
    leaf = _leaf(field)
    assert leaf is not None, "checked when the file was listed"
    return [leaf, f"{column}.path"] if _has_path(field) else [leaf]


def rows_without_bytes(opened: pq.ParquetFile, column: str) -> int:
    """Rows that have no bytes, of a column that may have paths instead, as far as the file's statistics say."""
    leaves = image_leaves(opened.schema_arrow, column)
    if len(leaves) == 1:
        return 0
    groups = (opened.metadata.row_group(group) for group in range(opened.metadata.num_row_groups))
    chunks = (group.column(index) for group in groups for index in range(group.num_columns))
    found = (chunk.statistics for chunk in chunks if chunk.path_in_schema == leaves[0])
    return sum(each.null_count for each in found if each is not None and each.has_null_count)


def _has_path(field: pa.Field) -> bool:
    if not pa.types.is_struct(field.type) or field.type.get_field_index("path") < 0:
        return False
    kind = field.type.field("path").type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _leaf(field: pa.Field) -> str | None:
    if _is_binary(field.type):
        return str(field.name)
    if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
        return f"{field.name}.bytes" if _is_binary(field.type.field("bytes").type) else None
    return None


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def no_column(file: str, option: str, name: str, schema: pa.Schema) -> SourceError:
    return SourceError(f"{file}: has no column {name!r} ({option}); its columns are {', '.join(schema.names)}")
