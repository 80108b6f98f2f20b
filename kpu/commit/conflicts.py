"""Publishing under a name that somebody else may have taken: what stands is judged, then kept or moved aside.

A marker (the plan, a teacher's `zarr.json`, a commit record) seals what it describes. What has no marker yet is the
rest of a run that died, or the work of another driver at the same moment. Nobody holds a lock, so a driver may move
aside what another one's marker describes a moment later: each sees to it that this stands again once the marker does.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kpu.errors import CorruptError, MismatchError, StorageError
from kpu.format.spec import ShardRecord
from kpu.shards.chunk import CRC_BYTES
from kpu.shards.layout import ArrayLayout, Shard
from kpu.shards.reader import open_shard
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.util.digests import DIGEST_BYTES, digest

_ATTEMPTS = 8  # each lost attempt means that another driver changed the name between two of our calls


@contextmanager
def settling(
    storage: Storage, marker: str, run: str, sealed: Callable[[], Mapping[str, str]]
) -> Iterator[Callable[[str, bytes], str]]:
    """Gives the function that publishes (key, data) before `marker` is published, as `settle_file` does.

    At the end, where `marker` stands by then, whoever published it, the files that it seals are put back if they were
    moved aside. `sealed` reads their digests, by key, from the marker.

    Raises:
        CorruptError: a sealed file does not stand, and is not in quarantine either.
    """
    try:
        yield lambda key, data: settle_file(storage, key, data, marker=marker, run=run)
    finally:
        if any(True for _ in storage.names(paths.QUARANTINE)) and storage.size(marker) is not None:
            _restore_files(storage, sealed(), marker, run)


def settle_file(storage: Storage, key: str, data: bytes, *, marker: str, run: str) -> str:
    """Publish `data` under `key`, moving aside anything else that stands there while `marker` does not. Its digest.

    Raises:
        MismatchError: other bytes stand there and the marker that describes them too.
    """
    for _ in range(_ATTEMPTS):
        if storage.publish(key, data, run=run):
            return digest(data)
        try:
            if storage.read(key) == data:
                return digest(data)
        except FileNotFoundError:
            continue
        if storage.size(marker) is None:
            storage.quarantine(key, run=run)
        if storage.size(marker) is not None:  # also if it came while the file was moved: it may be what was moved
            raise MismatchError(
                f"{key}: {marker} stands and describes other content than this run would write; another run with "
                "another configuration or other data published it at the same time; use the same configuration, or "
                "another `out`"
            )
    raise _contested(key)


def _restore_files(storage: Storage, sealed: Mapping[str, str], marker: str, run: str) -> None:
    for key, expected in sealed.items():
        for _ in range(_ATTEMPTS):
            standing = _read(storage, key)
            if standing is not None and digest(standing) == expected:
                break
            data = _find_quarantined(storage, key, expected)
            if data is None:
                raise CorruptError(key, f"is not the file that {marker} describes, which is not in quarantine either")
            storage.quarantine(key, run=run)
            storage.publish(key, data, run=run)
        else:
            raise _contested(key)


def _read(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.read(key)
    except FileNotFoundError:
        return None


def _find_quarantined(storage: Storage, key: str, expected: str) -> bytes | None:
    """The file with this digest that some run moved away from `key`; names of such files may carry a suffix."""
    folder, _, name = f"/{key}".rpartition("/")
    for run in storage.names(paths.QUARANTINE):
        place = f"{paths.QUARANTINE}/{run}{folder}"
        for found in storage.names(place):
            if found == name or found.startswith(f"{name}."):
                data = _read(storage, f"{place}/{found}")
                if data is not None and digest(data) == expected:
                    return data
    return None


@dataclass(frozen=True)
class Settled:
    """A shard that stands. `values` [n, *item], as stored, where it is another worker's, which agrees with ours."""

    record: ShardRecord
    values: npt.NDArray[Any] | None = None


@dataclass
class _Published:
    """What it takes to put a shard back: how to encode ours, and the bytes of others' that stood in its place."""

    array: ArrayLayout
    encode: Callable[[], Shard]
    others: list[bytes] = field(default_factory=list)


class UnitShards:
    """The shards of one unit, from their publication until the commit record `marker` stands."""

    def __init__(self, storage: Storage, unit: int, marker: str, run: str) -> None:
        self._storage, self._unit, self._marker, self._run = storage, unit, marker, run
        self._published: dict[str, _Published] = {}

    def publish(
        self,
        key: str,
        array: ArrayLayout,
        encode: Callable[[], Shard],
        agree: Callable[[npt.NDArray[Any]], bool],
    ) -> Settled | None:
        """Publish what `encode` gives, or keep a sound shard that stands there and agrees with it.

        `agree` compares the standing values [n, *item], as stored, with our own. None: the commit record stands, and
        describes another shard than ours.
        """
        shard = encode()
        ours = ShardRecord(bytes=len(shard.data), seal=shard.seal)
        published = self._published[key] = _Published(array, encode)
        for _ in range(_ATTEMPTS):
            if self._storage.publish(key, shard.data, run=self._run):
                return Settled(ours)
            try:
                standing = self._storage.read(key, limit=array.most_bytes)
            except FileNotFoundError:
                continue
            except CorruptError:  # larger than any shard of this array: not a shard
                standing = b""
            if standing == shard.data:
                return Settled(ours)
            if standing:
                published.others.append(standing)
            values = read_unrecorded(standing, array, key, self._unit)
            if values is not None and agree(values):
                return Settled(_claimed(standing, array), values)
            if self._storage.size(self._marker) is not None:
                return None
            self._storage.quarantine(key, run=self._run)
        raise _contested(key)

    def restore(self, records: Mapping[str, ShardRecord]) -> None:
        """See to it that of what was published here, that stands which the commit record describes; `records` by key.

        Two workers whose values disagree may each find the other's shard without a commit record, and move it aside
        in the same moment in which the other creates that record. Each then holds the other's bytes.

        Raises:
            CorruptError: another shard stands, and nobody here ever saw the committed one.
        """
        for key, published in self._published.items():
            array, record = published.array, records[key]
            for _ in range(_ATTEMPTS):
                if shard_stands(self._storage, key, array, self._unit, record):
                    break
                data = self._find(key, record)
                self._storage.quarantine(key, run=self._run)
                self._storage.publish(key, data, run=self._run)
            else:
                raise _contested(key)

    def _find(self, key: str, record: ShardRecord) -> bytes:
        published = self._published[key]
        for other in published.others:
            claimed = _claimed(other, published.array)
            if (claimed.bytes, claimed.seal) == (record.bytes, record.seal):
                return other
        ours = published.encode()
        if ours.seal != record.seal:
            raise CorruptError(key, "is not the shard that the commit record describes", unit=self._unit)
        return ours.data


def read_unrecorded(raw: bytes, array: ArrayLayout, key: str, unit: int) -> npt.NDArray[Any] | None:
    """Values [n, *item] of a shard that has no commit record; None where it is not sound in itself."""
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
    """The record that a shard would have if its seal were right."""
    end = max(len(raw) - 16 * array.chunks_per_shard - CRC_BYTES, 0)
    return ShardRecord(bytes=len(raw), seal=raw[max(end - DIGEST_BYTES, 0) : end].hex())


def shard_stands(storage: Storage, key: str, array: ArrayLayout, unit: int, record: ShardRecord) -> bool:
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


def _contested(key: str) -> StorageError:
    return StorageError(
        f"{key}: other runs keep changing it; expected that runs on one cache agree; stop all but one and run it again"
    )
