"""The shape of a listing: record batches of key, address and label."""

from collections.abc import Sequence
from typing import Final

import pyarrow as pa

from kpu.records.samples import ADDRESS
from kpu.sources.formats import Kind

BATCH_ROWS: Final = 65_536


def sample_batch(kind: Kind, keys: pa.Array, address: Sequence[pa.Array], labels: pa.Array) -> pa.RecordBatch:
    """Columns key string, those of the address (`kpu.records.samples.ADDRESS`), label int64 (nullable)."""
    schema = pa.schema([pa.field("key", pa.string(), nullable=False), *ADDRESS[kind], pa.field("label", pa.int64())])
    return pa.RecordBatch.from_arrays([keys, *address, labels], schema=schema)


def place(batch: pa.RecordBatch, row: int) -> str:
    """Where a row of a batch comes from, for messages."""
    address = [name for name in batch.schema.names if name not in ("key", "label", "file")]
    file = batch.column("file")[row].as_py()
    details = ", ".join(f"{name.replace('_', ' ')} {batch.column(name)[row].as_py()}" for name in address)
    return f"{file} ({details})" if details else file
