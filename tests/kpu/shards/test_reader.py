"""Shards are plain Zarr for others, and checked to the byte for us."""

import contextlib
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import LocalStore

from kpu.errors import CorruptError
from kpu.format.codecs import Packing
from kpu.format.commits import ShardRecord
from kpu.shards.chunk import crc, decode_chunk, encode_chunk
from kpu.shards.layout import ArrayLayout
from kpu.shards.reader import ShardReader, open_shard
from kpu.shards.writer import encode_shard
from kpu.shards.zarr_metadata import array_metadata, group_metadata
from kpu.storage import paths as places
from kpu.storage.local import LocalStorage
from tests.support.forging import forge_shard

# name: (dtype, fill, packing) of every codec, and of the arrays below images/
KINDS: dict[str, tuple[str, float, Packing]] = {
    "uniform": ("int16", -32768, "bytes"),
    "rotated": ("int16", -32768, "bits"),
    "fp32": ("float32", float("nan"), "plain"),
    "fp16": ("float16", float("nan"), "plain"),
    "bf16": ("uint16", 0x7FC0, "plain"),
    "digest": ("uint8", 0, "bytes"),
    "size": ("int32", 0, "bytes"),
}
ITEMS: dict[str, tuple[int, tuple[int, ...]]] = {"map": (1, (5, 6)), "vector": (8, (6,)), "scalar": (8, ())}
TARS: dict[str, tuple[int, tuple[int, ...]]] = {"map in tars": (1, (5, 6)), "vector in tars": (1, (6,))}


def make_layout(kind: str, item: str, rows: int = 37) -> ArrayLayout:
    dtype, fill, _ = KINDS[kind]
    chunk_rows, item_shape = {**ITEMS, **TARS}[item]
    member = "t.patch" if item in TARS else None
    return ArrayLayout(rows, 16, chunk_rows, item_shape, np.dtype(dtype), fill, packing_of(kind, member), member)


def packing_of(kind: str, member: str | None) -> Packing:
    packing = KINDS[kind][2]
    return packing if member is None or packing == "plain" else "gzip"


def make_values(layout: ArrayLayout, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 100, layout.shape).clip(-500, 500).astype(layout.dtype)


class Memory:
    """A handle on bytes."""

    remote = False

    def __init__(self, data: bytes, fetch_bytes: int = 128 << 10) -> None:
        self.data, self.size, self.fetch_bytes = data, len(data), fetch_bytes

    def read(self, offset: int, length: int) -> bytes:
        piece = self.data[offset : offset + length]
        if len(piece) != length:
            raise CorruptError("?", "ends early")
        return piece

    def close(self) -> None: ...


def open_bytes(data: bytes, layout: ArrayLayout, record: ShardRecord, unit: int = 0, **options: Any) -> ShardReader:
    return open_shard(Memory(data, **options), layout, record, file="t/patch/c/0", unit=unit, teacher="t")


def encode_unit(values: np.ndarray[Any, Any], layout: ArrayLayout, unit: int) -> tuple[bytes, ShardRecord]:
    shard = encode_shard(values[unit * layout.unit_rows : (unit + 1) * layout.unit_rows], layout, unit)
    return shard.data, ShardRecord(bytes=len(shard.data), seal=shard.seal)


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_zarr_and_tensorstore_read_what_is_written(tmp_path: Path, kind: str, item: str) -> None:
    layout = make_layout(kind, item)  # 37 rows in units of 16: the last unit holds 5, less than a chunk of 8
    values = make_values(layout)
    values[9:24] = layout.fill  # whole chunks of fill, which Zarr's own writers would leave out
    (tmp_path / "zarr.json").write_bytes(group_metadata({"kpu": {"format": "x"}}))
    folder = tmp_path / "patch"
    folder.mkdir()
    (folder / "zarr.json").write_bytes(array_metadata(layout, {"kpu": {"codec": kind}}))
    for unit in range(3):
        data, _ = encode_unit(values, layout, unit)
        path = tmp_path / places.shard("patch", unit, len(layout.item_shape))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    group = zarr.open_group(LocalStore(tmp_path, read_only=True), mode="r")
    assert list(group.array_keys()) == ["patch"]
    for array in (group["patch"], zarr.open_array(LocalStore(folder, read_only=True), mode="r")):
        assert isinstance(array, zarr.Array)
        assert array.attrs["kpu"] == {"codec": kind}
        np.testing.assert_array_equal(np.asarray(array[...]), values)
        np.testing.assert_array_equal(np.asarray(array[33]), values[33])
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    opened = tensorstore.open(spec, read=True).result()
    np.testing.assert_array_equal(opened.read().result(), values)
    np.testing.assert_array_equal(opened[33].read().result(), values[33])


@pytest.mark.parametrize("item", [*ITEMS, *TARS])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_back_in_any_order_with_repeats(kind: str, item: str) -> None:
    layout = make_layout(kind, item)
    values = make_values(layout)
    values[[3, 33]] = layout.fill
    for unit, rows in ((0, [15, 0, 3, 3, 15, 8, 7]), (1, list(range(16))), (2, [4, 0, 4]), (2, [2]), (0, [3]), (0, [])):
        for fetch_bytes in (1, 100, 1 << 20):
            data, record = encode_unit(values, layout, unit)
            reader = open_bytes(data, layout, record, unit, fetch_bytes=fetch_bytes)
            out = np.empty((len(rows), *layout.item_shape), layout.dtype)
            reader.read(np.array(rows, dtype=np.int64), out)
            np.testing.assert_array_equal(out, values[unit * 16 :][rows])
            reader.verify()


def test_rows_can_be_put_anywhere_in_a_larger_array() -> None:
    layout = make_layout("uniform", "map")
    values = make_values(layout)
    data, record = encode_unit(values, layout, 0)
    out = np.zeros((10, *layout.item_shape), np.int16)
    open_bytes(data, layout, record).read(np.array([5, 2, 5]), out, at=np.array([9, 0, 4]))
    np.testing.assert_array_equal(out[[9, 0, 4]], values[[5, 2, 5]])
    assert not out[[1, 2, 3, 5, 6, 7, 8]].any()
    for at in ([0, 10], [-1, 0]):
        with pytest.raises(IndexError, match="of 10 rows of out"):
            open_bytes(data, layout, record).read(np.array([5, 2]), out, at=np.array(at))


def test_rows_outside_the_unit_are_refused() -> None:
    layout = make_layout("uniform", "vector")
    data, record = encode_unit(make_values(layout), layout, 2)
    reader = open_bytes(data, layout, record, unit=2)
    assert reader.rows == 5
    for rows in ([5], [-1], [0, 7]):
        with pytest.raises(IndexError, match="of a unit that has 5"):
            reader.read(np.array(rows), np.empty((len(rows), 6), np.int16))
    for bad in (np.empty((1, 6), np.int32), np.empty((2, 6), np.int16), np.empty((6, 2), np.int16).T[:1]):
        with pytest.raises(ValueError, match="does not fit"):
            reader.read(np.array([0]), bad)


@pytest.mark.parametrize("member", [None, "t.patch"])
@pytest.mark.parametrize("kind", ["uniform", "rotated", "fp16"])
def test_large_reads_use_threads_and_give_the_same(tmp_path: Path, kind: str, member: str | None) -> None:
    dtype, fill, _ = KINDS[kind]
    layout = ArrayLayout(256, 256, 1, (64, 384), np.dtype(dtype), fill, packing_of(kind, member), member)
    values = make_values(layout)
    with ThreadPoolExecutor(2) as pool:
        shard = encode_shard(values, layout, 0, pool=pool)
    assert shard == encode_shard(values, layout, 0)
    (tmp_path / "shard").write_bytes(shard.data)
    record = ShardRecord(bytes=len(shard.data), seal=shard.seal)
    with_file = open_shard(LocalStorage(tmp_path).open("shard"), layout, record, file="f", unit=0, teacher="t")
    rows = np.random.default_rng(1).integers(0, 256, 300)
    out = np.empty((300, 64, 384), layout.dtype)
    with_file.read(rows, out)
    np.testing.assert_array_equal(out, values[rows])


@pytest.mark.parametrize("item", ["map", "map in tars"])
def test_encoding_is_a_function_of_the_values(item: str) -> None:
    layout = make_layout("uniform", item)
    values = make_values(layout)[:16]
    strided = np.asfortranarray(values)
    assert encode_shard(values, layout, 0) == encode_shard(strided, layout, 0)
    assert encode_shard(values, layout, 0).seal != encode_shard(values + np.int16(1), layout, 0).seal


@pytest.mark.parametrize(
    ("shape", "dtype"), [((17, 5, 6), "int16"), ((0, 5, 6), "int16"), ((4, 5, 7), "int16"), ((4, 5, 6), "int32")]
)
def test_values_that_do_not_fit_are_refused(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        encode_shard(np.zeros(shape, dtype), make_layout("uniform", "map"), 0)


UNIT = 2
DAMAGED = {
    (kind, item): (layout, *encode_unit(make_values(layout), layout, UNIT))
    for kind in ("uniform", "fp32")
    for item in ("map", "vector", "map in tars")
    for layout in [make_layout(kind, item)]
}


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(DAMAGED)), st.sampled_from(["flip", "remove", "truncate", "insert"]), st.data())
def test_any_damaged_byte_is_seen_by_a_read_of_its_row(
    which: tuple[str, str], damage: str, data: st.DataObject
) -> None:
    layout, good, record = DAMAGED[which]
    at = data.draw(st.integers(0, len(good) - 1), label="at")
    if damage == "flip":
        bad = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255), label="xor")]) + good[at + 1 :]
    else:
        bad = good[:at] + {"remove": good[at + 1 :], "truncate": b"", "insert": b"\0" + good[at:]}[damage]

    index = open_bytes(good, layout, record, UNIT).index
    touched = [chunk for chunk in range(len(index.starts)) if index.starts[chunk] <= at < index.ends[chunk]]
    with pytest.raises(CorruptError) as hit:
        open_bytes(bad, layout, record, UNIT).verify()
    assert (hit.value.file, hit.value.unit, hit.value.teacher) == ("t/patch/c/0", UNIT, "t")
    between = not touched and at < len(good) - 16 * (layout.chunks_per_shard + 1) - 4
    if not (between and damage == "flip"):  # the headers of a tar are needed for no row
        rows = np.array([next(iter(touched), 0) * layout.chunk_rows])
        with pytest.raises(CorruptError):
            open_bytes(bad, layout, record, UNIT).read(rows, np.empty((1, *layout.item_shape), layout.dtype))


@pytest.mark.parametrize("which", ["map", "map in tars"])
def test_damage_after_opening_is_seen(which: str) -> None:
    layout, good, record = DAMAGED["uniform", which]
    reader = open_bytes(good, layout, record, UNIT)
    handle = reader._handle
    assert isinstance(handle, Memory)
    for at in (0, len(good) - 1, len(good) - 30, len(good) - 350):
        handle.data = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        with pytest.raises(CorruptError):
            reader.verify()
    handle.data = good[: len(good) // 2]
    with pytest.raises(CorruptError, match="ends early"):
        reader.verify()


@pytest.mark.parametrize("item", ["map", "map in tars"])
@pytest.mark.parametrize("kind", KINDS)
def test_swapped_shards_are_seen_even_with_equal_indices(kind: str, item: str) -> None:
    layout = make_layout(kind, item)
    values = make_values(layout)
    (first, first_record), (second, second_record) = (encode_unit(values, layout, unit) for unit in (0, 1))
    if layout.packing == "plain" and item == "map":
        assert first[-260:] == second[-260:], "equal sizes give equal indices"
    for data, record, unit in ((first, second_record, 1), (second, first_record, 0)):
        with pytest.raises(CorruptError, match=r"seal differs|were committed"):
            open_bytes(data, layout, record, unit)


# Field of blosc's header: (offset, bytes, what it claims)
LIES: dict[str, tuple[int, int, int]] = {
    "version": (0, 1, 3),
    "codec version": (1, 1, 2),
    "reserved flag": (2, 1, 0b1001_1001),
    "lz4": (2, 1, 0b0011_0001),
    "memcpy": (2, 1, 0b1001_0011),
    "wide values": (3, 1, 255),
    "values of no bytes": (3, 1, 0),
    "decoded bytes": (4, 4, 2**31 - 17),
    "fewer decoded bytes": (4, 4, 2),
    "no block": (8, 4, 0),
    "huge block": (8, 4, 2**31 - 1),
    "odd block": (8, 4, 7),
    "many blocks": (8, 4, 2),
    "more bytes than there are": (12, 4, 2**24),
    "fewer bytes than there are": (12, 4, 16),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("kind", ["uniform", "rotated"])
def test_rejects_a_chunk_whose_header_lies(kind: str, lie: str) -> None:
    """Checksums are honest: blosc would read beyond the chunk, or give whatever lies in memory."""
    layout = ArrayLayout(4, 4, 1, (50, 60), np.dtype("int16"), -32768, packing_of(kind, None))
    data, _ = encode_unit(np.zeros(layout.shape, np.int16), layout, 0)
    offset, size, claim = LIES[lie]

    def edit(chunk: int, body: bytes) -> bytes:
        return body[:offset] + claim.to_bytes(size, "little") + body[offset + size :] if chunk == 1 else body

    forged, seal = forge_shard(data, layout, 4, edit)
    reader = open_bytes(forged, layout, ShardRecord(bytes=len(forged), seal=seal))
    out = np.empty((1, 50, 60), np.int16)
    reader.read(np.array([0]), out)
    for use in (lambda: reader.read(np.array([1]), out), reader.verify):
        with pytest.raises(CorruptError, match=r"chunk 1 cannot be decoded \(blosc header: expected"):
            use()


@pytest.mark.parametrize("body", [b"", b"\2\1", bytes(15)])
def test_rejects_a_chunk_shorter_than_its_header(body: bytes) -> None:
    layout = ArrayLayout(4, 4, 1, (50, 60), np.dtype("int16"), -32768, "bytes")
    with pytest.raises(ValueError, match="expected 16 bytes"):
        decode_chunk(body + crc(body), np.empty((1, 50, 60), np.int16), layout.packing)


@pytest.mark.parametrize("packing", ["bytes", "bits"])
def test_mangled_chunks_are_refused_or_give_the_same_twice(packing: Packing) -> None:
    """Wherever a chunk is mangled, blosc must fill the target, with nothing that was in memory before."""
    rng = random.Random(packing)
    values = np.random.default_rng(0).integers(0, 300, (1, 50, 60)).astype(np.int16)
    good, refused = encode_chunk(values, packing)[:-4], 0
    for _ in range(3000):
        body = bytearray(good)
        for _ in range(rng.choice((1, 1, 2))):
            place = rng.randrange(rng.choice((16, 48, len(body))))
            body[place] = rng.choice((0, 1, 2, 127, 128, 255, rng.randrange(256)))
        found, raw = [], bytes(body)
        for fill in (0, 0x5A5A):
            target = np.full((1, 50, 60), fill, np.int16)
            with contextlib.suppress(ValueError):
                decode_chunk(raw + crc(raw), target, packing)
                found.append(target)
        assert not found or np.array_equal(*found)
        refused += not found
    assert 1000 < refused < 3000


def test_a_shard_of_another_layout_is_refused() -> None:
    layout = make_layout("fp32", "map")
    data, record = encode_unit(make_values(layout), layout, 0)
    for other in (
        ArrayLayout(37, 16, 1, (5, 7), np.dtype("float32"), 0.0, "plain"),
        ArrayLayout(37, 8, 1, (5, 6), np.dtype("float32"), 0.0, "plain"),
        ArrayLayout(10, 16, 1, (5, 6), np.dtype("float32"), 0.0, "plain"),
    ):
        with pytest.raises(CorruptError):
            open_bytes(data, other, record)


def test_sizes_are_those_of_the_format() -> None:
    layout = make_layout("fp32", "map")
    data, _ = encode_unit(make_values(layout), layout, 2)
    chunk, index = 5 * 6 * 4 + 4, 16 * 16 + 4
    assert len(data) == 5 * chunk + 16 + index
    document = json.loads(array_metadata(layout, {}))
    assert document["codecs"][0]["configuration"]["index_location"] == "end"
