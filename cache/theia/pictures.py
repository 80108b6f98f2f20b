"""The images of a cache's rows as a viewer shows them, at their own size; a view is cut out, and mirrored where it is.

The same bytes as at extraction: each is compared with the digest that the cache keeps.
"""

import io

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from cache.digests import digest_bytes
from cache.errors import MismatchError, SourceError
from cache.pixels.decode import decode_image
from cache.pixels.views import resolve_view
from cache.reader import Cache
from cache.sources import source_reader
from cache.spec import ImageStatus


class Pictures:
    """Reads the images of a cache; `root`, if given, stands in for the folder or URL that the cache remembers."""

    def __init__(self, cache: Cache, root: str | None) -> None:
        source = cache.plan.source
        self._cache = cache
        self._source = source if root is None else source.model_copy(update={"root": root})
        self._reader = source_reader(self._source)

    def read(self, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8]]:
        """RGB pixels uint8 [H, W, 3] of unmasked rows, each of its own size.

        Raises:
            SourceError: an image is gone or cannot be read.
            MismatchError: it is not the one that was extracted.
        """
        table = self._cache.samples.take(rows)
        try:
            encoded = self._reader.read(table)
        except SourceError as error:
            raise SourceError(f"{error}. {self._advice()}") from error
        draws, expected = table["draws"].to_pylist(), self._cache.image_digests(rows)
        found = []
        for place, data in enumerate(encoded):
            image = self._decode(data, expected[place].tobytes(), table.slice(place, 1))
            view = resolve_view(draws[place], image.width, image.height, self._cache.plan.crop)
            shown = image if view.box is None else image.crop(view.box)
            found.append(np.asarray(shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else shown))
        return found

    def _decode(self, data: bytes, expected: bytes, record: pa.Table) -> Image.Image:
        image = decode_image(data)
        if digest_bytes(data) == expected and not isinstance(image, ImageStatus):
            return image
        key, file = (record[name][0].as_py() for name in ("key", "file"))
        raise MismatchError(
            f"image {key!r} ({self._source.root.rstrip('/')}/{file}): expected the image that {self._cache.path} was "
            f"extracted from (digest {expected.hex()}), which could be decoded; found digest "
            f"{digest_bytes(data).hex()}{f', {image.name}' if isinstance(image, ImageStatus) else ''}; restore it, or "
            f"the Pillow that extracted it. {self._advice()}"
        )

    def _advice(self) -> str:
        return f"If the images have moved, say where they are with --images (extracted from {self._source.root})"


def dump_picture(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Pixels as the bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(pixels), allow_pickle=False)
    return file.getvalue()
