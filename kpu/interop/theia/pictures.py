"""The images of a cache's rows as a viewer shows them, at their own size; a view is cut out, and mirrored where it is.

The same bytes as at extraction: each is compared with the digest that the cache keeps.
"""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from kpu.pixels.views import resolve_view
from kpu.reading.cache import Cache
from kpu.reading.source_images import SourceImages


class Pictures:
    """Reads the images of a cache; `root`, if given, replaces the folder or URL that the cache remembers."""

    def __init__(self, cache: Cache, root: str | None) -> None:
        self._cache = cache
        self._originals = SourceImages(cache, root, option="--images")

    def read(self, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8]]:
        """RGB pixels uint8 [H, W, 3] of unmasked rows, each of its own size.

        Raises:
            SourceError: an image is gone or cannot be read.
            MismatchError: it is not the one that was extracted.
        """
        table = self._cache.samples.take(rows)
        encoded = self._originals.read(table)
        draws, expected = table["draws"].to_pylist(), self._cache.image_digests(rows)
        found = []
        for place, data in enumerate(encoded):
            with self._originals.decode(data, expected[place], table.slice(place, 1)) as image:
                view = resolve_view(draws[place], image.width, image.height, self._cache.plan.crop)
                shown = image if view.box is None else image.crop(view.box)
                found.append(np.asarray(shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else shown))
        return found


def dump_picture(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Pixels as the bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(pixels), allow_pickle=False)
    return file.getvalue()
