"""Tars are plain WebDataset files for others."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from kpu.errors import CorruptError
from kpu.format.codecs import Packing
from kpu.shards.layout import ArrayLayout
from kpu.shards.tar import decode_member, encode_member, is_fill, member_name
from kpu.shards.writer import encode_shard
from kpu.shards.zarr_metadata import array_layout, array_metadata

KINDS: dict[str, tuple[str, float, Packing]] = {
    "uniform": ("int16", -32768, "gzip"),
    "fp32": ("float32", float("nan"), "plain"),
    "fp16": ("float16", float("nan"), "plain"),
    "bf16": ("uint16", 0x7FC0, "plain"),
}
MASKED = [3, 16]
ROWS, UNIT_ROWS = 37, 16


def make_layout(kind: str, item_shape: tuple[int, ...] = (5, 6), member: str = "alpha.patch") -> ArrayLayout:
    dtype, fill, packing = KINDS[kind]
    return ArrayLayout(ROWS, UNIT_ROWS, 1, item_shape, np.dtype(dtype), fill, packing, member)


def make_values(layout: ArrayLayout) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(0).normal(0, 100, layout.shape).clip(-500, 500).astype(layout.dtype)
    values[MASKED] = layout.fill
    return values


def write(folder: Path, layout: ArrayLayout, values: np.ndarray[Any, Any]) -> list[str]:
    paths = []
    for unit in range(3):
        part = values[unit * UNIT_ROWS : (unit + 1) * UNIT_ROWS]
        path = folder / layout.key("column", unit)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_shard(part, layout, unit).data)
        paths.append(str(path))
    return paths


@pytest.mark.parametrize("shape", [(5, 6), (6,)])
@pytest.mark.parametrize("kind", KINDS)
def test_webdataset_reads_what_is_written(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    layout = make_layout(kind, shape)
    values = make_values(layout)
    paths = write(tmp_path, layout, values)
    assert [Path(path).name for path in paths] == ["000000.tar", "000001.tar", "000002.tar"]
    found = {}
    for sample in webdataset.WebDataset(paths, shardshuffle=False, nodesplitter=None).decode():
        (name,) = [key for key in sample if not key.startswith("__")]
        assert name in ("alpha.patch.npy", "alpha.patch.npy.gz")
        found[int(sample["__key__"])] = sample[name]
    assert list(found) == [row for row in range(ROWS) if row not in MASKED]
    for row, array in found.items():
        assert array.dtype == layout.dtype
        np.testing.assert_array_equal(array, values[row])


def test_headers_tell_nothing_of_when_and_by_whom(tmp_path: Path) -> None:
    layout = make_layout("fp16")
    (path, *_) = write(tmp_path, layout, make_values(layout))
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert len(members) > 1
        for member in members:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.isreg()
            file = tar.extractfile(member)
            assert file is not None
            assert np.load(io.BytesIO(file.read())).shape == (5, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_survive_their_metadata(kind: str) -> None:
    layout = make_layout(kind)
    raw = array_metadata(layout, {"kpu": {"codec": kind}})
    found, attributes = array_layout(raw, "zarr.json")
    assert attributes["kpu"] == {"codec": kind}
    assert array_metadata(found, {"kpu": {"codec": kind}}) == raw
    assert (found.shape, found.dtype, found.member) == (layout.shape, layout.dtype, layout.member)


@pytest.mark.parametrize(
    "change", [{"shape": [0, 5]}, {"dtype": "complex64"}, {"member": 3}, {"rows_per_tar": "x"}, {"shape": None}]
)
def test_damaged_metadata_is_refused(change: dict[str, Any]) -> None:
    document = json.loads(array_metadata(make_layout("uniform"), {}))
    document["attributes"]["tar"] |= change
    with pytest.raises(CorruptError, match=r"f/zarr\.json.*not the metadata"):
        array_layout(json.dumps(document).encode(), "f/zarr.json")


def test_members_of_another_shape_are_refused() -> None:
    values = np.arange(30, dtype=np.int16).reshape(5, 6)
    for compressed in (True, False):
        raw = encode_member(values, compressed=compressed)
        target = np.empty_like(values)
        decode_member(raw, target, compressed=compressed)
        np.testing.assert_array_equal(target, values)
        for other in (np.empty((6, 5), np.int16), np.empty((5, 6), np.uint16), np.empty((5, 5), np.int16)):
            with pytest.raises(ValueError, match=r"bytes where|longer or shorter"):
                decode_member(raw, other, compressed=compressed)
        with pytest.raises(ValueError, match=r"bytes where|longer or shorter|rror"):
            decode_member(raw[:-9], target, compressed=compressed)


def test_keys_sort_as_rows_do() -> None:
    names = [member_name(row, "a.patch", compressed=True) for row in (0, 9, 10, 10**11)]
    assert names == sorted(names)
    assert names[1] == "000000000009.a.patch.npy.gz"


def test_a_row_is_masked_only_if_all_of_it_is_fill() -> None:
    assert is_fill(np.full(3, -32768, np.int16), -32768)
    assert not is_fill(np.array([-32768, 0], np.int16), -32768)
    assert is_fill(np.full(3, np.nan, np.float32), float("nan"))
    assert not is_fill(np.array([np.nan, 0], np.float32), float("nan"))
