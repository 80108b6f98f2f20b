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
        tars = document["node_type"] == "group"
        layout = _tar_layout(document["attributes"]["tar"]) if tars else _layout(document, file)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CorruptError(file, f"is not the metadata of an array of a cache ({error!r})") from None
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
    rows, *item_shape = attributes["shape"]
    if attributes["dtype"] not in _DTYPES or not isinstance(attributes["member"], str):
        raise ValueError(f"tar: expected a dtype among {_DTYPES} and the name of members, found {attributes}")
    fill = attributes["fill"]
    return ArrayLayout(
        rows=int(rows),
        unit_rows=int(attributes["rows_per_tar"]),
        chunk_rows=1,
        item_shape=tuple(int(length) for length in item_shape),
        dtype=np.dtype(attributes["dtype"]),
        fill=float("nan") if fill is None else int(fill),
        packing="gzip" if attributes["gzip"] else "plain",
        member=attributes["member"],
    )


def _layout(document: dict[str, Any], file: str) -> ArrayLayout:
    _expect(file, "node_type", "array", document["node_type"])
    if document["data_type"] not in _DTYPES:
        raise CorruptError(file, f"data_type: expected one of {', '.join(_DTYPES)}, found {document['data_type']!r}")
    dtype = np.dtype(document["data_type"])
    _expect(file, "chunk_key_encoding", ("default", {"separator": "/"}), _named(document["chunk_key_encoding"]))
    _expect(file, "storage_transformers", [], document.get("storage_transformers", []))
    grid, grid_options = _named(document["chunk_grid"])
    _expect(file, "chunk_grid", "regular", grid)
    (sharding,) = document["codecs"]
    name, options = _named(sharding)
    _expect(file, "codecs", "sharding_indexed", name)
    _expect(file, "index_location", "end", options.get("index_location", "end"))
    little = ("bytes", {"endian": "little"})
    _expect(file, "index_codecs", [little, ("crc32c", {})], [_named(codec) for codec in options["index_codecs"]])
    codecs = [_named(codec) for codec in options["codecs"]]
    shape, shard, chunk = document["shape"], grid_options["chunk_shape"], options["chunk_shape"]
    names = tuple(codec for codec, _ in codecs)
    if names not in _PACKINGS:
        raise CorruptError(file, f"codecs: expected one of {list(_PACKINGS)}, found {names}")
    if dtype.itemsize > 1:
        _expect(file, "codecs", little, codecs[names.index("bytes")])
    if names[0] == "transpose":
        _expect(file, "transpose", list(_channels_first(len(shape))), codecs[0][1]["order"])

    _expect(file, "inner dimensions of the shards", shape[1:], shard[1:])
    _expect(file, "inner dimensions of the chunks", shape[1:], chunk[1:])
    fill = document["fill_value"]
    return ArrayLayout(
        rows=int(shape[0]),
        unit_rows=int(shard[0]),
        chunk_rows=int(chunk[0]),
        item_shape=tuple(int(length) for length in shape[1:]),
        dtype=dtype,
        fill=float(fill) if dtype.kind == "f" else int(fill),
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


def _named(value: Any) -> tuple[str, dict[str, Any]]:
    """Name and configuration of a Zarr extension point, which may be a bare name."""
    if isinstance(value, str):
        return value, {}
    return value["name"], value.get("configuration", {})


def _expect(file: str, field: str, expected: object, found: object) -> None:
    if found != expected:
        raise CorruptError(file, f"{field}: expected {expected!r}, found {found!r}")
