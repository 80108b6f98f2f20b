"""`zarr.json` documents survive the way through zarr-python and back, and nothing else is taken for one."""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kpu.errors import CorruptError
from kpu.shards.layout import ArrayLayout
from kpu.shards.zarr_metadata import array_layout, array_metadata, group_metadata

LAYOUTS = [
    ArrayLayout(100, 64, 1, (197, 384), np.dtype("int16"), -32768, "bytes"),
    ArrayLayout(100, 64, 1, (197, 384), np.dtype("int16"), -32768, "bits"),
    ArrayLayout(100, 64, 64, (384,), np.dtype("int16"), -32768, "bits"),
    ArrayLayout(10, 64, 64, (64,), np.dtype("float16"), float("nan"), "plain"),
    ArrayLayout(1_000_000_000, 4096, 64, (64,), np.dtype("float32"), float("nan"), "plain"),
    ArrayLayout(100, 64, 1, (4, 4), np.dtype("uint16"), 0x7FC0, "plain"),
    ArrayLayout(100, 64, 64, (), np.dtype("uint8"), 255, "bytes"),
    ArrayLayout(100, 128, 64, (2,), np.dtype("int32"), 0, "bytes"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout.dtype))
def test_layouts_and_attributes_come_back(layout: ArrayLayout) -> None:
    attributes = {"kpu": {"centre": [0.1, -2.5e-30], "grid": None, "name": "Σ"}}
    raw = array_metadata(layout, attributes)
    assert raw == array_metadata(layout, attributes)
    found, found_attributes = array_layout(raw, "t/patch/zarr.json")
    assert repr(found) == repr(layout)  # NaN differs from itself
    assert found_attributes == attributes


def test_float32_numbers_survive_exactly() -> None:
    numbers = np.random.default_rng(0).normal(size=100).astype(np.float32)
    raw = array_metadata(LAYOUTS[0], {"kpu": {"scale": numbers.tolist()}})
    _, attributes = array_layout(raw, "f")
    np.testing.assert_array_equal(np.array(attributes["kpu"]["scale"], np.float32), numbers)


def change(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = to

    return apply


SHARDING = ("codecs", 0, "configuration")


@pytest.mark.parametrize(
    "damage",
    [
        change("zarr_format", to=2),
        change("node_type", to="group"),
        change("data_type", to="float64"),
        change("shape", to=[100, 197]),
        change("shape", to="100"),
        change("chunk_grid", "configuration", "chunk_shape", to=[64, 197, 192]),
        change("chunk_grid", "configuration", "chunk_shape", to=[0, 197, 384]),
        change("chunk_grid", "name", to="rectilinear"),
        change("chunk_key_encoding", "configuration", "separator", to="."),
        change("codecs", to=[{"name": "bytes", "configuration": {"endian": "little"}}]),
        change(*SHARDING, "chunk_shape", to=[0, 197, 384]),
        change(*SHARDING, "codecs", 0, "configuration", "endian", to="big"),
        change(*SHARDING, "codecs", 1, "name", to="gzip"),
        change(*SHARDING, "codecs", 2, "name", to="zstd"),
        change(*SHARDING, "index_location", to="start"),
        change(*SHARDING, "index_codecs", to=[{"name": "bytes", "configuration": {"endian": "little"}}]),
        change("fill_value", to=None),
        change("storage_transformers", to=[{"name": "x"}]),
        change("attributes", to=3),
    ],
)
def test_other_arrays_are_refused(damage: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(array_metadata(LAYOUTS[0], {}))
    damage(document)
    with pytest.raises(CorruptError, match=r"^t/patch/zarr\.json: ") as hit:
        array_layout(json.dumps(document).encode(), "t/patch/zarr.json")
    assert hit.value.file == "t/patch/zarr.json"


@pytest.mark.parametrize(
    "damage",
    [
        change(*SHARDING, "codecs", 0, "configuration", "order", to=[0, 1, 2]),
        change(*SHARDING, "codecs", 1, "configuration", "endian", to="big"),
        change(*SHARDING, "codecs", 2, "name", to="gzip"),
    ],
)
def test_other_arrays_with_channels_first_are_refused(damage: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(array_metadata(LAYOUTS[1], {}))
    damage(document)
    with pytest.raises(CorruptError, match=r"^f: "):
        array_layout(json.dumps(document).encode(), "f")


def _paths(value: Any) -> list[tuple[Any, ...]]:
    """The way to every value inside a JSON document."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, inner in pairs for way in [(key,), *((key, *rest) for rest in _paths(inner))]]


_PYTHON = re.compile(r"Error\(|subscript|object has|unpack|iterable|argument|literal")
_TAR = ArrayLayout(100, 64, 1, (4,), np.dtype("int16"), -32768, "plain", "npy")


@pytest.mark.parametrize("layout", [*LAYOUTS[1:4], _TAR], ids=lambda layout: layout.packing)
def test_no_damage_shows_the_text_of_an_error_of_python(layout: ArrayLayout) -> None:
    whole = array_metadata(layout, {})
    for path in _paths(json.loads(whole)):
        for value in (None, "x", -1, 1.5, True, [], {}, ["a"], [[]], [{"name": []}]):
            document = json.loads(whole)
            change(*path, to=value)(document)
            try:
                array_layout(json.dumps(document).encode(), "f")
            except CorruptError as error:
                assert not _PYTHON.search(str(error)), error


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("shape", to=7), "shape: expected a list of lengths, found 7"),
        (change("shape", 0, to="9"), "shape: expected an integer from 1, found '9'"),
        (change("chunk_grid", to=None), "chunk_grid: expected a name and its configuration, found nothing"),
        (change("codecs", to=5), "codecs: expected a list of codecs, found 5"),
        (change("fill_value", to="x"), "fill value: expected a number of int16, found 'x'"),
    ],
)
def test_a_damaged_field_is_named_with_what_was_found(damage: Callable[[dict[str, Any]], None], message: str) -> None:
    document = json.loads(array_metadata(LAYOUTS[0], {}))
    damage(document)
    with pytest.raises(CorruptError, match=re.escape(message)):
        array_layout(json.dumps(document).encode(), "f")


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b"null", group_metadata({})])
def test_rejects_documents_that_are_not_an_array(raw: bytes) -> None:
    with pytest.raises(CorruptError):
        array_layout(raw, "f")


def test_metadata_of_equal_meaning_is_accepted() -> None:
    document = json.loads(array_metadata(LAYOUTS[0], {}))
    document["codecs"][0]["configuration"]["codecs"][2] = "crc32c"
    document["codecs"][0]["configuration"]["index_codecs"][1]["configuration"] = {}
    del document["storage_transformers"]
    assert repr(array_layout(json.dumps(document).encode(), "f")[0]) == repr(LAYOUTS[0])
