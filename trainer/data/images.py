"""The pixels of a cache's rows, as extraction saw them: read by address, checked, decoded, cropped per view, resized.

Letters: n rows asked for, B images of a batch, H and W the height and width of a model's input.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from kpu.format.teacher import InputSpec
from kpu.pixels.resize import geometry, resize_image
from kpu.pixels.views import resolve_view
from kpu.reading.cache import Cache
from kpu.reading.source_images import SourceImages
from kpu.records.samples import Samples
from kpu.storage.open import open_storage
from kpu.storage.paths import UNITS_PER_PART
from kpu.util.digests import DIGEST_BYTES
from kpu.util.lru import LRUCache
from trainer.data.resident import RowNumbers

_HELD_ROWS: Final = 2**22  # of the sample table, some 100 bytes each: random rows lie in all of its parts
_HELD_UNITS: Final = 2**12  # of digests, at most 64 KiB each


class ImageReader:
    """Reads the images of one cache for a model's `input`. Safe to use from several threads.

    `root`, if given, replaces the folder or URL that the cache remembers; `option` is what a user sets to give it;
    `threads` decode at once.

    Raises (on opening):
        ConfigError: there is no such folder, or no such kind of URL.
    """

    def __init__(
        self,
        cache: Cache,
        input: InputSpec,  # noqa: A002
        *,
        root: str | None,
        threads: int,
        option: str = "images.root",
    ) -> None:
        self._cache, self._geometry = cache, geometry(input)
        self._originals = SourceImages(cache, root, option=option)
        parts = max(2, _HELD_ROWS // (UNITS_PER_PART * cache.plan.unit_rows))
        self._samples = Samples(open_storage(cache.path), cache.plan, cached_parts=parts)
        self._digests: LRUCache[int, npt.NDArray[np.uint8]] = LRUCache(_HELD_UNITS)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 1 else None

    def load(self, rows: RowNumbers) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Pixels uint8 [n, H, W, 3] of any rows, and which of them have an image, bool [n]; the others are black.

        A row that is masked in the cache is not read at all.

        Raises:
            MismatchError: an image is not the one that was extracted.
            SourceError: an image is gone or cannot be read.
            MissingUnitError: a row's unit is not committed.
            CorruptError: the cache is damaged.
        """
        pixels = np.zeros((len(rows), *self._geometry.size, 3), np.uint8)
        valid = self._cache.valid(rows)
        wanted = np.flatnonzero(valid)
        # Views of one sample share its bytes, and in order of rows neighbours in a file are read together.
        samples, first, owner = np.unique(
            rows[wanted] // self._cache.plan.views, return_index=True, return_inverse=True
        )
        if not len(samples):
            return pixels, valid
        table = self._samples.take(rows[wanted])
        heads = table.take(pa.array(first))
        encoded, expected = self._originals.read(heads), self._expected(rows[wanted[first]])
        draws = table["draws"].to_pylist()
        members = np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner))[:-1])

        def work(chunk: range) -> None:
            for sample in chunk:
                with self._originals.decode(encoded[sample], expected[sample], heads.slice(sample, 1)) as image:
                    for member in members[sample]:
                        view = resolve_view(draws[member], image.width, image.height, self._cache.plan.crop)
                        resize_image(image, self._geometry, view, out=pixels[wanted[member]])

        self._spread(work, len(samples))
        return pixels, valid

    def _spread(self, work: Callable[[range], None], count: int) -> None:
        """Run `work` on ranges that make up 0 .. count - 1, with all threads."""
        if self._pool is None:
            work(range(count))
            return
        length = max(1, count // (4 * self._threads))
        for _ in self._pool.map(work, (range(at, min(at + length, count)) for at in range(0, count, length))):
            pass

    def _expected(self, rows: RowNumbers) -> npt.NDArray[np.uint8]:
        """Digests of the images of rows, uint8 [n, 16]; whole units are kept, for random rows come back to them."""
        plan = self._cache.plan
        digests = np.empty((len(rows), DIGEST_BYTES), np.uint8)
        units = rows // plan.unit_rows
        for unit in np.unique(units).tolist():
            inside = units == unit
            digests[inside] = self._digests.get(unit, self._load_digests)[rows[inside] - unit * plan.unit_rows]
        return digests

    def _load_digests(self, unit: int) -> npt.NDArray[np.uint8]:
        rows = self._cache.plan.unit_range(unit)
        return self._cache.image_digests(slice(rows.start, rows.stop))


def normalise(pixels_BHWC: Tensor, input: InputSpec) -> Tensor:  # noqa: A002
    """(x / 255 - mean) / std per channel of uint8 pixels, as float32 [B, 3, H, W] on their device."""
    mean, std = (_channels(values, pixels_BHWC.device) for values in (input.mean, input.std))
    values = pixels_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return values.div_(255).sub_(mean).div_(std)


@lru_cache(maxsize=64)
def _channels(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """float32 [1, 3, 1, 1]; made once for a device, since a GPU would be waited for."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)
