"""What is particular to object stores; what they share with folders is in test_storage.py."""

import secrets
from threading import Barrier
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from kpu.errors import CorruptError, StorageError
from kpu.format.commits import ShardRecord
from kpu.shards.chunk import CRC_BYTES
from kpu.shards.layout import ArrayLayout
from kpu.shards.reader import open_shard
from kpu.shards.writer import encode_shard
from kpu.storage.base import Storage
from kpu.storage.object_store import ObjectStorage
from kpu.storage.open import open_storage


@pytest.fixture
def s3(s3_bucket: str) -> Storage:
    return open_storage(f"{s3_bucket}/{secrets.token_hex(4)}/my.kpu", create=True)


class Overwriting(MemoryFileSystem):
    """A store that does not know conditional puts."""

    protocol = "overwriting"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:  # noqa: ARG002
        super().pipe_file(path, value, mode="overwrite")


def test_a_store_without_conditional_puts_is_refused() -> None:
    fsspec.register_implementation("overwriting", Overwriting, clobber=True)
    with pytest.raises(StorageError, match=r"If-None-Match: \*.*found one that overwrites"):
        open_storage("overwriting://cache", create=True)


def test_creating_leaves_no_probe(s3: Storage) -> None:
    open_storage(s3.url, create=True)
    assert list(s3.names(".tmp")) == []


def test_an_absent_bucket_and_an_unknown_scheme_are_named(s3_bucket: str) -> None:
    with pytest.raises(StorageError, match=r"nosuchbucket.*cannot write.*does not exist"):
        open_storage(s3_bucket.replace("kpu-", "nosuchbucket-"), create=True)
    with pytest.raises(StorageError, match="nosuchscheme://x"):
        open_storage("nosuchscheme://x")


def test_rows_of_a_shard_are_read_by_range(s3: Storage) -> None:
    rng = np.random.default_rng(0)
    layout = ArrayLayout(100, 64, 1, (7, 33), np.dtype("int16"), -32768, "bytes")
    values = rng.integers(-300, 300, (36, 7, 33)).astype("int16")
    shard = encode_shard(values, layout, 0)
    s3.publish("teachers/t/patch/c/1/0/0", shard.data, run="r")
    record = ShardRecord(bytes=len(shard.data), seal=shard.seal)
    handle = s3.open("teachers/t/patch/c/1/0/0")
    reader = open_shard(handle, layout, record, file="teachers/t/patch/c/1/0/0", unit=1, teacher="t")
    rows = np.array([35, 0, 17, 17])
    out = np.empty((4, 7, 33), np.int16)
    reader.read(rows, out)
    np.testing.assert_array_equal(out, values[rows])
    reader.verify()

    s3.quarantine("teachers/t/patch/c/1/0/0", run="r")
    with pytest.raises(CorruptError, match="was removed"):
        reader.read(rows, out)


def test_far_apart_pieces_are_fetched_in_parallel_and_near_ones_together(
    s3: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = ArrayLayout(12, 64, 1, (1 << 18,), np.dtype("float32"), 0.0, "plain")
    shard = encode_shard(np.arange(12, dtype=np.float32)[:, None] + np.zeros((1, 1 << 18), np.float32), layout, 0)
    s3.publish("shard", shard.data, run="r")
    record = ShardRecord(bytes=len(shard.data), seal=shard.seal)
    reader = open_shard(s3.open("shard"), layout, record, file="shard", unit=0, teacher=None)
    fetched: list[tuple[int, int]] = []
    read_range, together = ObjectStorage.read_range, Barrier(3)

    def noted(self: ObjectStorage, key: str, start: int, end: int) -> bytes:
        fetched.append((start, end))
        together.wait(60)  # until all three are under way
        return read_range(self, key, start, end)

    monkeypatch.setattr(ObjectStorage, "read_range", noted)
    rows = np.array([11, 0, 1, 6])
    out = np.empty((4, 1 << 18), np.float32)
    reader.read(rows, out)
    assert (out == rows[:, None]).all()
    row = layout.row_bytes + CRC_BYTES
    assert sorted(fetched) == [(0, 2 * row), (6 * row, 7 * row), (11 * row, 12 * row)]


def test_put_conflicts_are_tried_again(s3: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 answers 409 ConditionalRequestConflict while another put of the name is under way."""
    assert isinstance(s3, ObjectStorage)
    put, conflicts = s3._fs.pipe_file, iter([True, True, False])

    def conflicting(path: str, data: bytes, **options: Any) -> None:
        if next(conflicts, False):
            cause = Exception()
            cause.response = {"Error": {"Code": "ConditionalRequestConflict"}}  # type: ignore[attr-defined]
            raise OSError(5, "conflict") from cause
        put(path, data, **options)

    monkeypatch.setattr(s3._fs, "pipe_file", conflicting)
    assert s3.publish("object", b"x", run="r") is True
    assert s3.publish("object", b"y", run="r") is False
