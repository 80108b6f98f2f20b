"""Publish the shards of a unit, and resolve conflicts between workers that publish the same unit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kpu.commit.conflicts import ATTEMPTS, contested
from kpu.errors import CorruptError
from kpu.format.commits import ShardRecord
from kpu.shards.chunk import CRC_BYTES
from kpu.shards.layout import ArrayLayout, Shard
from kpu.shards.reader import open_shard
from kpu.storage.base import Storage
from kpu.util.digests import DIGEST_BYTES


class ShardSource(Protocol):
    """A shard to publish."""

    @property
    def layout(self) -> ArrayLayout: ...

    def encode(self) -> Shard:
        """The bytes of the shard; called again if a conflict needs them a second time."""

    def accepts(self, values: npt.NDArray[Any]) -> bool:
        """Whether another worker's shard, holding `values` [n, *item] as stored, may stay instead of this one."""


@dataclass(frozen=True)
class PublishResult:
    """A published shard; `values` [n, *item], as stored, if it is another worker's that was accepted."""

    record: ShardRecord
    values: npt.NDArray[Any] | None = None


@dataclass
class _Published:
    """What restoring a shard needs: our own, and the bytes of conflicting ones."""

    source: ShardSource
    others: list[bytes] = field(default_factory=list)


class ShardTransaction:
    """The shards of one unit, from their publication until the commit record `marker` is published."""

    def __init__(self, storage: Storage, unit: int, marker: str, run: str) -> None:
        self._storage, self._unit, self._marker, self._run = storage, unit, marker, run
        self._published: dict[str, _Published] = {}

    def publish(self, key: str, source: ShardSource) -> PublishResult | None:
        """Publish a shard, or keep an intact one that exists already and that `source` accepts.

        Returns: None if the unit's commit record exists and describes another shard.
        """
        shard, layout = source.encode(), source.layout
        ours = ShardRecord(bytes=len(shard.data), seal=shard.seal)
        published = self._published[key] = _Published(source)
        for _ in range(ATTEMPTS):
            if self._storage.publish(key, shard.data, run=self._run):
                return PublishResult(ours)
            try:
                existing = self._storage.read(key, limit=layout.most_bytes)
            except FileNotFoundError:
                continue
            except CorruptError:  # larger than any shard of this array: not a shard
                existing = b""
            if existing == shard.data:
                return PublishResult(ours)
            if existing:
                published.others.append(existing)
            values = read_unrecorded(existing, layout, key, self._unit)
            if values is not None and source.accepts(values):
                return PublishResult(_claimed(existing, layout), values)
            if self._storage.size(self._marker) is not None:
                return None
            self._storage.quarantine(key, run=self._run)
        raise contested(key)

    def restore(self, records: Mapping[str, ShardRecord]) -> None:
        """Restore those of the published shards that the commit record describes; `records` by key.

        Two workers whose values differ may each find the other's shard without a commit record, and quarantine it just
        as the other one publishes that record. Each of them then holds the other's bytes.

        Raises:
            CorruptError: a key holds another shard, and the committed one was never seen here.
        """
        for key, published in self._published.items():
            layout, record = published.source.layout, records[key]
            for _ in range(ATTEMPTS):
                if is_committed_shard(self._storage, key, layout, self._unit, record):
                    break
                data = self._find(key, record)
                self._storage.quarantine(key, run=self._run)
                self._storage.publish(key, data, run=self._run)
            else:
                raise contested(key)

    def _find(self, key: str, record: ShardRecord) -> bytes:
        published = self._published[key]
        for other in published.others:
            claimed = _claimed(other, published.source.layout)
            if (claimed.bytes, claimed.seal) == (record.bytes, record.seal):
                return other
        ours = published.source.encode()
        if ours.seal != record.seal:
            raise CorruptError(key, "is not the shard that the commit record describes", unit=self._unit)
        return ours.data


def read_unrecorded(raw: bytes, array: ArrayLayout, key: str, unit: int) -> npt.NDArray[Any] | None:
    """Values [n, *item] of a shard that has no commit record; None if it is not sound in itself."""
    rows = array.valid_rows(unit)
    values = np.empty((rows, *array.item_shape), array.dtype)
    try:
        reader = open_shard(BytesHandle(raw), array, _claimed(raw, array), file=key, unit=unit, teacher=None)
        reader.verify()
        reader.read(np.arange(rows), values)
    except CorruptError:
        return None
    return values


def _claimed(raw: bytes, array: ArrayLayout) -> ShardRecord:
    """The record of a shard whose seal is taken at its word."""
    end = max(len(raw) - 16 * array.chunks_per_shard - CRC_BYTES, 0)
    return ShardRecord(bytes=len(raw), seal=raw[max(end - DIGEST_BYTES, 0) : end].hex())


def is_committed_shard(storage: Storage, key: str, array: ArrayLayout, unit: int, record: ShardRecord) -> bool:
    """Whether the object under `key` is the one that `record` describes, by its size, index and seal."""
    try:
        handle = storage.open(key)
    except FileNotFoundError:
        return False
    try:
        open_shard(handle, array, record, file=key, unit=unit, teacher=None)
    except CorruptError:
        return False
    finally:
        handle.close()
    return True


class BytesHandle:
    """Random access to an object that is already in memory."""

    remote = False
    fetch_bytes = 128 << 10

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self.size = len(raw)

    def read(self, offset: int, length: int) -> bytes:
        data = self._raw[offset : offset + length]
        if len(data) != length:
            raise CorruptError("shard", f"ends before byte {offset + length}")
        return data

    def close(self) -> None:
        """Nothing is held open."""
