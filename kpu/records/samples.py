"""The sample table: the image and the view of every row.

It lies in Parquet files of 64 units each, one row group a unit, and is read part by part: the raw bytes of a part are
compared with the plan's digest before anything in them is believed.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kpu.errors import CorruptError
from kpu.format.plan import Plan
from kpu.records.sample_part import read_part
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.util.digests import DIGEST_BYTES, digest, digest_of
from kpu.util.lru import LRUCache

_THREADS: Final = 4
_FILE: Final = pa.field("file", pa.string(), nullable=False)
ADDRESS: Final[dict[str, tuple[pa.Field, ...]]] = {
    "folder": (_FILE,),
    "tar": (_FILE, pa.field("offset", pa.int64(), nullable=False), pa.field("length", pa.int64(), nullable=False)),
    "parquet": (_FILE, pa.field("row_group", pa.int32(), nullable=False), pa.field("row", pa.int32(), nullable=False)),
}


def sample_schema(kind: str) -> pa.Schema:
    """Columns of the sample table of a `folder`, `tar` or `parquet` source.

    `file` is relative to the source's root, `draws` are five float64 random numbers in [0, 1) a view, null for the
    plain full view, and `label` is null where the source has none. (Draws are no list of a fixed size: Arrow below 26
    writes nulls of one, and cannot read them back.)
    """
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("view", pa.int32(), nullable=False),
            *ADDRESS[kind],
            pa.field("label", pa.int64()),
            pa.field("draws", pa.list_(pa.float64())),
        ]
    )


def _streams(table: pa.Table) -> Iterator[tuple[str, bytes | memoryview]]:
    """A table's content as named byte streams that do not depend on chunks, offsets or what lies under a null."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        for chunk in column.chunks:
            if not len(chunk):
                continue
            if table.schema.field(name).nullable:
                yield f"{name}.valid", np.asarray(chunk.is_valid(), dtype=np.uint8).data
            if pa.types.is_string(chunk.type):
                offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
                yield f"{name}.length", np.diff(offsets).data
                yield f"{name}.bytes", memoryview(chunk.buffers()[2] or b"")[offsets[0] : offsets[-1]]
            elif pa.types.is_list(chunk.type):
                yield name, chunk.flatten().to_numpy(zero_copy_only=False).data
            else:
                yield name, chunk.fill_null(0).to_numpy(zero_copy_only=False).data


class Fingerprint:
    """Digest of an ordered table's content, the same however the table is cut into pieces."""

    def __init__(self) -> None:
        self._states: dict[str, Any] = {}

    def update(self, table: pa.Table) -> None:
        for stream, data in _streams(table):
            if stream not in self._states:
                self._states[stream] = hashlib.blake2b(digest_size=DIGEST_BYTES)
            self._states[stream].update(data)

    def hexdigest(self) -> str:
        return digest_of({stream: state.hexdigest() for stream, state in self._states.items()})


def row_digest(table: pa.Table) -> str:
    """What commit records say of a unit's rows: digest of its keys and view numbers, in order."""
    fingerprint = Fingerprint()
    fingerprint.update(table.select(["key", "view"]))
    return fingerprint.hexdigest()


def write_part(table: pa.Table, unit_rows: int) -> bytes:
    """The bytes of one Parquet file of the sample table. The same table gives the same bytes, however it is chunked."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(),
        sink,
        row_group_size=unit_rows,
        version="2.6",
        compression="zstd",
        use_dictionary=["file"],  # keys are unique: a dictionary of them only adds bytes
        write_statistics=False,
        write_page_checksum=True,
    )
    return bytes(sink.getvalue())


class Samples:
    """The sample table of a cache, read lazily, one part of 64 units at a time. Safe to use from several threads.

    `cached_parts` is how many decoded parts stay in memory.
    """

    def __init__(self, storage: Storage, plan: Plan, *, cached_parts: int = 2) -> None:
        self._storage, self._plan = storage, plan
        self._part_rows = paths.UNITS_PER_PART * plan.unit_rows
        self._parts: LRUCache[int, pa.Table] = LRUCache(cached_parts)
        self.schema: pa.Schema = sample_schema(plan.source.kind)

    def __len__(self) -> int:
        return self._plan.rows

    @property
    def parts(self) -> int:
        """Number of Parquet files."""
        return len(self._plan.samples_digests)

    def part(self, part: int) -> pa.Table:
        """One file of the table.

        Raises:
            CorruptError: the file is missing, or its bytes are not those that the plan digested.
        """
        return self._parts.get(part, self._load)

    def _load(self, part: int, columns: Sequence[str] | None = None) -> pa.Table:
        if not 0 <= part < self.parts:
            raise IndexError(f"part {part} of {self.parts}")
        file = paths.samples_part(part)
        try:
            raw = self._storage.read(file)
        except FileNotFoundError:
            raise CorruptError(file, "is missing") from None
        found, expected = digest(raw), self._plan.samples_digests[part]
        if found != expected:
            raise CorruptError(file, f"does not match the plan: expected digest {expected}, found {found}")
        first = part * self._part_rows
        rows = range(first, min(first + self._part_rows, len(self)))
        return read_part(raw, file, self.schema, rows, self._plan.views, columns)

    def unit(self, unit: int) -> pa.Table:
        """The rows of one unit, in order."""
        rows = self._plan.unit_range(unit)
        part, within = divmod(rows.start, self._part_rows)
        return self.part(part).slice(within, len(rows))

    def take(self, rows: Sequence[int] | np.ndarray[Any, Any]) -> pa.Table:
        """Any rows by number, in the order asked for; repeats are allowed.

        Raises:
            IndexError: a row is outside the table.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if outside.size:
            raise IndexError(f"row {outside[0]} of {len(self)}")
        if not wanted.size:
            return self.schema.empty_table()
        parts = wanted // self._part_rows
        order = np.argsort(parts, kind="stable")
        pieces = []
        for part in np.unique(parts):
            chosen = wanted[order[parts[order] == part]] - part * self._part_rows
            pieces.append(self.part(int(part)).take(pa.array(chosen)))
        back = np.empty_like(order)
        back[order] = np.arange(order.size)
        return pa.concat_tables(pieces).take(pa.array(back))

    def iter_batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Every row in order, one part at a time, so that memory does not grow with the table.

        With `columns` no other is decoded.
        """
        for part in range(self.parts):
            yield self.part(part) if columns is None else self._load(part, columns)

    def count_labels(self) -> int:
        """How many rows have a label that is the number of a class: not null, and not below 0. Raises as `part`."""

        def count(part: int) -> int:
            return int(pc.sum(pc.greater_equal(self._load(part, ["label"])["label"], 0)).as_py() or 0)

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="kpu-samples") as pool:
            return sum(pool.map(count, range(self.parts)))

    def to_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The whole table, or some columns of it, in memory."""
        return pa.concat_tables(self.iter_batches(columns))


def split_parts(tables: Iterable[pa.Table], unit_rows: int) -> Iterator[pa.Table]:
    """Cut or join tables of any length to parts of exactly 64 units, the last one shorter."""
    size = paths.UNITS_PER_PART * unit_rows
    waiting: list[pa.Table] = []
    held = 0
    for table in tables:
        waiting.append(table)
        held += table.num_rows
        if held >= size:
            joined = pa.concat_tables(waiting)
            whole = held // size * size
            for start in range(0, whole, size):
                yield joined.slice(start, size).combine_chunks()
            waiting, held = [joined.slice(whole)], held - whole
    if held:
        yield pa.concat_tables(waiting).combine_chunks()
