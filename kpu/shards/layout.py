"""The layout of an array: how its rows are cut into units and chunks, and under which keys the units lie."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Final

import numpy as np

from kpu.format.codecs import Packing
from kpu.storage import paths as keys

ABSENT: Final = 2**64 - 1  # offset and size of a chunk that is not there


@dataclass(frozen=True)
class ArrayLayout:
    """Shape and storage of one array: [rows, *item_shape], one shard a unit, `chunk_rows` rows an inner chunk.

    With `member` a shard is a tar instead, of one file `<row>.<member>` a row; a chunk is one row then.
    """

    rows: int
    unit_rows: int
    chunk_rows: int
    item_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: int | float
    packing: Packing
    member: str | None = None

    def __post_init__(self) -> None:
        smallest = min(self.rows, self.unit_rows, self.chunk_rows, *self.item_shape)
        if self.member is not None and self.chunk_rows != 1:
            raise ValueError(f"a tar holds one row a member: {self}")
        if self.packing not in (("plain", "gzip") if self.member is not None else ("plain", "bytes", "bits")):
            raise ValueError(f"packing {self.packing} is not for this format: {self}")
        if smallest < 1 or self.unit_rows % self.chunk_rows:
            raise ValueError(f"unit_rows must be a multiple of chunk_rows, and no dimension empty: {self}")

    @property
    def gzipped(self) -> bool:
        """Whether the members of a tar are."""
        return self.packing == "gzip"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.item_shape)

    @property
    def shard_shape(self) -> tuple[int, ...]:
        return (self.unit_rows, *self.item_shape)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.chunk_rows, *self.item_shape)

    @property
    def chunks_per_shard(self) -> int:
        return self.unit_rows // self.chunk_rows

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of one decoded chunk."""
        return self.chunk_rows * self.row_bytes

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one decoded row."""
        return prod(self.item_shape) * self.dtype.itemsize

    @property
    def most_bytes(self) -> int:
        """Bytes that no encoded shard of this array exceeds: of its values twice over, and of what frames each row."""
        return self.unit_rows * (2 * self.row_bytes + 4096) + 2**20

    def key(self, folder: str, unit: int) -> str:
        """The object that holds `unit` of the array in `folder`."""
        return keys.shard(folder, unit, len(self.item_shape)) if self.member is None else keys.tar(folder, unit)

    def valid_rows(self, unit: int) -> int:
        """Rows of the array that lie in `unit`."""
        return max(0, min(self.unit_rows, self.rows - unit * self.unit_rows))


@dataclass(frozen=True)
class Shard:
    """The bytes of one shard and the seal inside them, as hexadecimal digits."""

    data: bytes
    seal: str
