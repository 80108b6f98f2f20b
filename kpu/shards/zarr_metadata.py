"""`zarr.json` documents: written by zarr-python itself, parsed back strictly."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from kpu.errors import CorruptError
from kpu.format.codecs import Packing
from kpu.shards.chunk import BLOSC_BLOCK, BLOSC_CNAME, BLOSC_LEVEL, BLOSC_SHUFFLE
from kpu.shards.layout import ArrayLayout
from kpu.util.strict_json import parse_json_object

_PACKINGS: Final[dict[tuple[str, ...], Packing]] = {
    ("bytes", "crc32c"): "plain",
    ("bytes", "blosc", "crc32c"): "bytes",
    ("transpose", "bytes", "blosc", "crc32c"): "bits",
}
"""By the names of a chunk's codecs in Zarr."""
_DTYPES: Final = ("uint8", "int16", "uint16", "int32", "float16", "float32")


def group_metadata(attributes: Mapping[str, Any]) -> bytes:
    """The `zarr.json` of a group."""
    stored: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(stored), attributes=dict(attributes), zarr_format=3)
    return stored["zarr.json"].to_bytes()


def array_metadata(layout: ArrayLayout, attributes: Mapping[str, Any]) -> bytes:
    """The `zarr.json` of an array of this layout; of a group, with an attribute `tar`, where it is kept in tars."""
    if layout.member is not None:
        return group_metadata({**attributes, "tar": _tar_attributes(layout)})
    filters: list[TransposeCodec] = []
    compressors: list[BloscCodec | Crc32cCodec] = [Crc32cCodec()]
    if layout.packing == "bits":
        filters.append(TransposeCodec(order=_channels_first(len(layout.shape))))
    if layout.packing in BLOSC_SHUFFLE:
        blosc = BloscCodec(
            typesize=layout.dtype.itemsize,
            cname=BLOSC_CNAME,
            clevel=BLOSC_LEVEL,
            shuffle=BLOSC_SHUFFLE[layout.packing],
            blocksize=BLOSC_BLOCK,
        )
        compressors.insert(0, blosc)
    stored: dict[str, Buffer] = {}
    zarr.create_array(
        MemoryStore(stored),
        shape=layout.shape,
        shards=layout.shard_shape,
        chunks=layout.chunk_shape,
        dtype=layout.dtype,
        fill_value=layout.fill,
        filters=filters,
        compressors=compressors,
        attributes=dict(attributes),
        zarr_format=3,
    )
    return stored["zarr.json"].to_bytes()


def array_layout(raw: bytes, file: str) -> tuple[ArrayLayout, dict[str, Any]]:
    """Layout and attributes of an array's `zarr.json`.

    Raises:
        CorruptError: `raw` is not the metadata of an array that `array_metadata` could have written.
    """
    document = _parse(raw, file)
    try:
        tars = document.get("node_type") == "group"
        layout = _tar_layout(_object(document, "attributes", "tar")) if tars else _layout(document, file)
    except (ValueError, OverflowError) as error:
        raise CorruptError(file, f"is not the metadata of an array of a cache: {error}") from None
    return layout, _attributes(document, file)


def _tar_attributes(layout: ArrayLayout) -> dict[str, Any]:
    return {
        "shape": list(layout.shape),
        "dtype": layout.dtype.name,
        "fill": None if np.isnan(layout.fill) else layout.fill,
        "rows_per_tar": layout.unit_rows,
        "member": layout.member,
        "gzip": layout.gzipped,
    }


def _tar_layout(attributes: dict[str, Any]) -> ArrayLayout:
    rows, *item_shape = _lengths(attributes, "shape")
    member, fill = attributes.get("member"), attributes.get("fill")
    if attributes.get("dtype") not in _DTYPES or not isinstance(member, str):
        raise ValueError(f"tar: expected a dtype among {_DTYPES} and the name of members, found {attributes}")
    return ArrayLayout(
        rows=rows,
        unit_rows=_length(attributes.get("rows_per_tar"), "rows_per_tar"),
        chunk_rows=1,
        item_shape=tuple(item_shape),
        dtype=np.dtype(attributes["dtype"]),
        fill=float("nan") if fill is None else _fill(fill, np.dtype("int32")),
        packing="gzip" if attributes.get("gzip") else "plain",
        member=member,
    )


def _layout(document: dict[str, Any], file: str) -> ArrayLayout:
    _expect(file, "node_type", "array", document.get("node_type"))
    if document.get("data_type") not in _DTYPES:
        raise CorruptError(
            file, f"data_type: expected one of {', '.join(_DTYPES)}, found {document.get('data_type')!r}"
        )
    dtype = np.dtype(document["data_type"])
    encoding = _named(document.get("chunk_key_encoding"), "chunk_key_encoding")
    _expect(file, "chunk_key_encoding", ("default", {"separator": "/"}), encoding)
    _expect(file, "storage_transformers", [], document.get("storage_transformers", []))
    grid, grid_options = _named(document.get("chunk_grid"), "chunk_grid")
    _expect(file, "chunk_grid", "regular", grid)
    sharding = _codecs(document, "codecs")
    _expect(file, "codecs", ["sharding_indexed"], [name for name, _ in sharding])
    options = sharding[0][1]
    _expect(file, "index_location", "end", options.get("index_location", "end"))
    little = ("bytes", {"endian": "little"})
    _expect(file, "index_codecs", [little, ("crc32c", {})], _codecs(options, "index_codecs"))
    codecs = _codecs(options, "codecs")
    names = tuple(codec for codec, _ in codecs)
    if names not in _PACKINGS:
        raise CorruptError(file, f"codecs: expected one of {list(_PACKINGS)}, found {names}")
    if dtype.itemsize > 1:
        _expect(file, "codecs", little, codecs[names.index("bytes")])
    shape, shard, chunk = (
        _lengths(document, "shape"),
        _lengths(grid_options, "chunk_shape"),
        _lengths(options, "chunk_shape"),
    )
    if names[0] == "transpose":
        _expect(file, "transpose", list(_channels_first(len(shape))), codecs[0][1].get("order"))
    _expect(file, "inner dimensions of the shards", shape[1:], shard[1:])
    _expect(file, "inner dimensions of the chunks", shape[1:], chunk[1:])
    return ArrayLayout(
        rows=shape[0],
        unit_rows=shard[0],
        chunk_rows=chunk[0],
        item_shape=tuple(shape[1:]),
        dtype=dtype,
        fill=_fill(document.get("fill_value"), dtype),
        packing=_PACKINGS[names],
    )


def _channels_first(dimensions: int) -> tuple[int, ...]:
    """The order in which Zarr's `transpose` brings the last dimension to the front."""
    return (dimensions - 1, *range(dimensions - 1))


def _parse(raw: bytes, file: str) -> dict[str, Any]:
    try:
        document = parse_json_object(raw)
    except ValueError as error:
        raise CorruptError(file, f"is not JSON ({error})") from None
    _expect(file, "zarr_format", 3, document.get("zarr_format"))
    return document


def _attributes(document: dict[str, Any], file: str) -> dict[str, Any]:
    attributes = document.get("attributes", {})
    if not isinstance(attributes, dict):
        raise CorruptError(file, f"attributes: expected a JSON object, found {attributes!r}")
    return attributes


def _named(value: Any, field: str) -> tuple[str, dict[str, Any]]:
    """Name and configuration of a Zarr extension point, which may be a bare name."""
    if isinstance(value, str):
        return value, {}
    name, options = (value.get("name"), value.get("configuration", {})) if isinstance(value, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(options, dict):
        raise _unexpected(field, "a name and its configuration", value)
    return name, options


def _codecs(owner: dict[str, Any], field: str) -> list[tuple[str, dict[str, Any]]]:
    found = owner.get(field)
    if not isinstance(found, list):
        raise _unexpected(field, "a list of codecs", found)
    return [_named(codec, field) for codec in found]


def _object(document: dict[str, Any], *fields: str) -> dict[str, Any]:
    """The JSON object below a path of keys."""
    found: Any = document
    for depth, field in enumerate(fields, 1):
        found = found.get(field)
        if not isinstance(found, dict):
            raise _unexpected(".".join(fields[:depth]), "a JSON object", found)
    return dict(found)


def _lengths(owner: dict[str, Any], field: str) -> list[int]:
    found = owner.get(field)
    if not isinstance(found, list) or not found:
        raise _unexpected(field, "a list of lengths", found)
    return [_length(length, field) for length in found]


def _length(value: Any, field: str) -> int:
    if type(value) is not int or value < 1:
        raise _unexpected(field, "an integer from 1", value)
    return value


def _fill(value: Any, dtype: np.dtype[Any]) -> int | float:
    if dtype.kind == "f" and (type(value) in (int, float) or value in ("NaN", "Infinity", "-Infinity")):
        return float(value)
    if dtype.kind == "f" or type(value) is not int:
        raise _unexpected("fill value", f"a number of {dtype.name}", value)
    return value


def _unexpected(field: str, expected: str, found: Any) -> ValueError:
    return ValueError(f"{field}: expected {expected}, found {'nothing' if found is None else repr(found)[:80]}")


def _expect(file: str, field: str, expected: object, found: object) -> None:
    if found != expected:
        raise CorruptError(file, f"{field}: expected {expected!r}, found {found!r}")
