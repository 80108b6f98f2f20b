"""Reading single images out of Parquet row groups, with the last few row groups decoded in memory."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kpu.errors import SourceError
from kpu.format.plan import SourceSpec
from kpu.sources.files import Files, Piece
from kpu.sources.parquet.besides import Named, read_named
from kpu.sources.parquet.image_column import image_column, image_leaves
from kpu.sources.parquet.listing import open_parquet

_OPEN_FILES: Final = 16
_BLOCK_BYTES: Final = 64 * 2**20
_HELD_BYTES: Final = 256 * 2**20


class _Block(NamedTuple):
    """Consecutive rows of one row group, decoded; `paths` are for images that the file does not hold."""

    start: int
    images: pa.Array
    paths: pa.Array | None = None

    @property
    def stop(self) -> int:
        return self.start + len(self.images)

    @property
    def nbytes(self) -> int:
        return int(self.images.nbytes) + (0 if self.paths is None else int(self.paths.nbytes))


class _Cursor:
    """One row group, decoded forwards in blocks of about 64 MB: all of it at once, if it is no larger."""

    def __init__(self, opened: pq.ParquetFile, group: int, column: str) -> None:
        leaves = image_leaves(opened.schema_arrow, column)
        metadata = opened.metadata.row_group(group)
        self.rows: int = metadata.num_rows
        chunks = (metadata.column(index) for index in range(metadata.num_columns))
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == leaves[0])
        length = max(1, min(self.rows, self.rows * _BLOCK_BYTES // max(size, 1)))
        self._batches: Iterator[pa.RecordBatch] = opened.iter_batches(
            length, row_groups=[group], columns=leaves, use_threads=False
        )
        self._column = column
        self.next_row = 0

    def advance(self) -> _Block:
        """The next block."""
        batch = next(self._batches, None)
        if batch is None or not batch.num_rows:
            raise pa.ArrowInvalid(f"pages end at row {self.next_row} of {self.rows}")
        # A column's name may be that of another's field, `image.bytes`: Parquet gives both.
        column = batch.column(batch.schema.get_field_index(self._column))
        if pa.types.is_struct(column.type):  # one that is null hides its children: struct_field carries that over
            names = [field.name for field in column.type]
            images, *paths = (pc.struct_field(column, name) for name in ("bytes", "path") if name in names)
            block = _Block(self.next_row, images, paths[0] if paths else None)
        else:
            block = _Block(self.next_row, column)
        self.next_row = block.stop
        return block


class ParquetReader:
    """Reads the image column's bytes of the row groups that are needed, and no other column."""

    def __init__(self, spec: SourceSpec) -> None:
        self._files = Files(spec.root)
        self._column = spec.options.get("image")
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._opened: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._cursors: OrderedDict[tuple[str, int], _Cursor] = OrderedDict()
        self._blocks: OrderedDict[tuple[str, int, int], _Block] = OrderedDict()

    def __getstate__(self) -> tuple[Files, str | None]:
        return self._files, self._column

    def __setstate__(self, state: tuple[Files, str | None]) -> None:
        self._files, self._column = state
        self._reset()

    def read(self, table: pa.Table) -> list[bytes]:
        """Encoded bytes of each row, in order; a null gives b"", with the reason where a path leads nowhere.

        Raises:
            SourceError: a file is gone, unreadable, corrupt, or has fewer rows than planned.
        """
        if self._pid != os.getpid():
            self._reset()
        columns = ("file", "row_group", "row", "key")
        rows = list(zip(*(table[name].to_pylist() for name in columns), strict=True))
        result = [b""] * len(rows)
        named: dict[int, Named] = {}
        block, where = _Block(0, ()), ("", -1)
        for index in sorted(range(len(rows)), key=lambda index: rows[index][:3]):
            file, group, row, key = rows[index]
            if where != (file, group) or not block.start <= row < block.stop:
                block, where = self._block(file, group, row, key), (file, group)
            result[index] = block.images[row - block.start].as_py() or b""
            if not result[index] and block.paths is not None and (path := block.paths[row - block.start].as_py()):
                named[index] = Named(file, path, key)
        for index, data in zip(named, read_named(self._files, list(named.values())), strict=True):
            result[index] = data
        return result

    def _block(self, file: str, group: int, row: int, key: str) -> _Block:
        """The decoded block that holds a row. One thread decodes at a time: others mostly want the same block."""
        piece = Piece(file, key)
        with self._lock:
            for name, held in reversed(self._blocks.items()):
                if name[:2] == (file, group) and held.start <= row < held.stop:
                    self._blocks.move_to_end(name)
                    return held
            try:
                return self._files.retry(lambda: self._decode(piece, group, row), piece)
            except BaseException:
                self._forget(file)
                raise

    def _decode(self, piece: Piece, group: int, row: int) -> _Block:
        file = piece.file
        cursor = self._cursors.pop((file, group), None)  # one that fails is not used again
        try:
            if cursor is None or cursor.next_row > row:
                cursor = self._cursor(piece, group)
            if row >= cursor.rows:
                raise self._shrank(piece, f"row {row} of row group {group}", f"{cursor.rows} rows in it")
            block = cursor.advance()
            while block.stop <= row:
                block = cursor.advance()
        except OSError:
            self._forget(file)  # the next attempt opens it again
            raise
        if cursor.next_row < cursor.rows:
            self._cursors[file, group] = cursor
            if len(self._cursors) > _OPEN_FILES:
                self._cursors.popitem(last=False)
        self._blocks[file, group, block.start] = block
        while len(self._blocks) > 1 and sum(held.nbytes for held in self._blocks.values()) > _HELD_BYTES:
            self._blocks.popitem(last=False)
        return block

    def _cursor(self, piece: Piece, group: int) -> _Cursor:
        file = piece.file
        opened = self._opened.get(file)
        if opened is None:
            opened = self._opened[file] = open_parquet(self._files, file, piece.key)
            if len(self._opened) > _OPEN_FILES:
                self._opened.popitem(last=False)
        self._opened.move_to_end(file)
        column = image_column(opened.schema_arrow, self._files.name(file), self._column)
        if group >= opened.metadata.num_row_groups:
            raise self._shrank(piece, f"row group {group}", f"{opened.metadata.num_row_groups} row groups")
        return _Cursor(opened, group, column)

    def _shrank(self, piece: Piece, expected: str, found: str) -> SourceError:
        return SourceError(
            f"{self._files.name(piece.file)} (key {piece.key!r}): expected {expected}, found {found}: "
            "it was rewritten since it was listed; restore it"
        )

    def _forget(self, file: str) -> None:
        self._opened.pop(file, None)
        for name in [name for name in self._cursors if name[0] == file]:
            del self._cursors[name]
