"""From rows of the sample table to batches of pixels: read, decode once, crop per view, resize per geometry.

Letters: B rows of a batch, H and W the height and width of a teacher's input.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kpu.format.commits import ImageStatus
from kpu.format.plan import CropSpec, Decoding
from kpu.pixels.decode import Decoded
from kpu.pixels.resize import Geometry, resize_image
from kpu.pixels.views import resolve_view
from kpu.sources import SourceReader
from kpu.util.digests import DIGEST_BYTES, digest_bytes
from pipeline.run.reports import Stopwatch
from pipeline.worker.prefetch import prefetch

READ_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of a table, beginning at `start`; masked rows are black.

    `pixels` holds uint8 [B, H, W, 3] for each geometry; `digest` uint8 [B, 16], `status` uint8 [B] and `size` int32
    [B, 2] (height, width after rotation) are what decoding found.
    """

    start: int
    pixels: dict[Geometry, np.ndarray]
    digest: np.ndarray
    status: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.status)


class ImageLoader:
    """Loads batches with a pool of threads; `decode_ahead` batches are decoded before they are asked for."""

    def __init__(
        self,
        reader: SourceReader,
        pool: Executor,
        threads: int,
        decode_ahead: int,
        crop: CropSpec | None = None,
        decoding: Decoding = Decoding(),  # noqa: B008 - frozen
    ) -> None:
        self._reader = reader
        self._crop, self._decoding = crop, decoding
        self._pool = pool
        self._threads = threads
        self._decode_ahead = decode_ahead

    def batches(self, table: pa.Table, size: int, geometries: Sequence[Geometry], watch: Stopwatch) -> Iterator[Batch]:
        """Yield the rows of `table` in order, `size` at a time (the last batch may be shorter)."""

        def fetch() -> Iterator[tuple[int, pa.Table, list[bytes]]]:
            for start in range(0, table.num_rows, size):
                part = table.slice(start, size)
                with watch("read"):
                    encoded = self._reader.read(_first_views(part))
                yield start, part, encoded

        def decode() -> Iterator[Batch]:
            for start, part, encoded in prefetch(fetch(), READ_AHEAD):
                with watch("decode"):
                    batch = self._decode(start, part, encoded, geometries)
                yield batch

        return prefetch(decode(), self._decode_ahead)

    def _decode(self, start: int, part: pa.Table, encoded: list[bytes], geometries: Sequence[Geometry]) -> Batch:
        rows = part.num_rows
        batch = Batch(
            start,
            {geometry: np.zeros((rows, *geometry.size, 3), np.uint8) for geometry in geometries},
            np.zeros((rows, DIGEST_BYTES), np.uint8),
            np.zeros(rows, np.uint8),
            np.zeros((rows, 2), np.int32),
        )
        draws = part["draws"].to_pylist()
        groups = _groups(part)

        def work(chunk: Sequence[tuple[range, bytes]]) -> None:
            for members, data in chunk:
                _fill(batch, members, data, draws, geometries, self._crop, self._decoding)

        pairs = list(zip(groups, encoded, strict=True))
        length = max(1, len(pairs) // (4 * self._threads))
        chunks = [pairs[at : at + length] for at in range(0, len(pairs), length)]
        for _ in self._pool.map(work, chunks):
            pass
        return batch


def _groups(part: pa.Table) -> list[range]:
    """Runs of neighbouring rows that are views of one sample."""
    keys = part["key"].combine_chunks()
    changes = pc.not_equal(keys.slice(1), keys.slice(0, max(0, len(keys) - 1))).to_numpy(zero_copy_only=False)
    starts = [0, *(np.flatnonzero(changes) + 1).tolist(), len(keys)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def _first_views(part: pa.Table) -> pa.Table:
    groups = _groups(part)
    return part if len(groups) == part.num_rows else part.take([group.start for group in groups])


def _fill(
    batch: Batch,
    members: range,
    data: bytes,
    draws: Sequence[Sequence[float] | None],
    geometries: Sequence[Geometry],
    crop: CropSpec | None,
    decoding: Decoding,
) -> None:
    rows = slice(members.start, members.stop)
    batch.digest[rows] = np.frombuffer(digest_bytes(data), np.uint8)
    with Decoded(data, decoding) as image:
        if isinstance(image, ImageStatus):
            batch.status[rows] = image
            return
        batch.size[rows] = (image.height, image.width)
        for row in members:
            view = resolve_view(draws[row], image.width, image.height, crop)
            for geometry in geometries:
                resize_image(image, geometry, view, out=batch.pixels[geometry][row])
