"""The images that a cache was extracted from, each compared with the digest that the cache keeps."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from kpu.errors import ConfigError, MismatchError, SourceError
from kpu.format.commits import ImageStatus
from kpu.format.plan import SourceSpec
from kpu.format.reasons import reason
from kpu.pixels.decode import Decoded
from kpu.reading.cache import Cache
from kpu.sources import source_reader
from kpu.sources.files import file_system, is_local, to_bytes, to_text
from kpu.storage import paths
from kpu.storage.places import redact, refuse_password, require_plain
from kpu.util.digests import digest_bytes


class SourceImages:
    """Reads and checks a cache's images. Safe to use from several threads.

    `root`, if given, replaces the folder or URL that the cache remembers; `option` is what a user sets to give it.

    Raises (on opening):
        ConfigError: there is no such folder, or no such kind of URL.
    """

    def __init__(self, cache: Cache, root: str | None, *, option: str) -> None:
        self._path, self._advice = cache.path, if_moved(cache, option)
        self._source = source_at(cache, root, option)
        self._reader = source_reader(self._source)

    def read(self, records: pa.Table) -> list[bytes]:
        """The encoded bytes of records of the sample table.

        Raises:
            SourceError: an image is gone or cannot be read.
        """
        try:
            return self._reader.read(records)
        except SourceError as error:
            raise error.with_advice(self._advice) from error

    @contextmanager
    def decode(self, data: bytes, expected: npt.NDArray[np.uint8], record: pa.Table) -> Iterator[Image.Image]:
        """The image in the bytes of one record whose digest was `expected`, uint8 [16], at extraction.

        While the context is open, other threads of this process leave the image its memory.

        Raises:
            MismatchError: it is not the one that was extracted.
        """
        found = digest_bytes(data)
        if found != expected.tobytes():
            raise MismatchError(
                f"{self._name(record)}: expected the image that {self._path} was extracted from (digest "
                f"{expected.tobytes().hex()}), found other bytes ({found.hex()}); restore it, or extract into a new "
                f"cache. {self._advice}"
            )
        with Decoded(data, self._source.decoding) as image:
            if isinstance(image, ImageStatus):
                raise MismatchError(
                    f"{self._name(record)}: expected an image that can be decoded, as at extraction, found "
                    f"{image.name} ({reason(image)}) with the very same bytes; install the Pillow, with its codecs and "
                    "plug-ins, that extracted the cache, or extract into a new cache what an earlier release decoded "
                    "wrongly"
                )
            yield image

    def _name(self, record: pa.Table) -> str:
        key, file = (record[name][0].as_py() for name in ("key", "file"))
        return f"image {key!r} ({redact(self._source.root).rstrip('/')}/{file})"


def if_moved(cache: Cache, option: str) -> str:
    """What to do where a cache's images are not found, as a sentence of a message."""
    return (
        f"If the images of {cache.path} have moved, set {option} to where they are now (extracted from "
        f"{redact(cache.plan.source.root)})"
    )


def source_at(cache: Cache, root: str | None, option: str) -> SourceSpec:
    """The cache's source, below `root` where one is given; `option` is what a user sets to give it.

    Raises:
        ConfigError: there is no such folder, or no such kind of URL; or the cache itself names another place than a
            folder or an object store.
    """
    spec = cache.plan.source
    if root is None:
        said_by = f"{cache.path}: {paths.PLAN}"
        require_plain(spec.root, said_by=said_by, advice=f"set {option} to where the images are")
        if is_local(spec.root) and not spec.root.startswith("/"):
            raise ConfigError(
                f"{said_by}: expected the images in a folder with an absolute path, found {spec.root!r}; set {option} "
                "to where they are"
            )
    else:
        refuse_password(root, option)
        place = to_text(str(Path(root).expanduser().absolute())) if is_local(root) else root
        spec = spec.model_copy(update={"root": place})
    if is_local(spec.root):
        if not os.path.isdir(to_bytes(spec.root)):  # noqa: PTH112
            raise ConfigError(
                f"{option}: expected the folder of the images that {cache.path} was extracted from, found no folder "
                f"{spec.root}; set {option} to where they are now"
            )
        return spec
    try:
        file_system(spec.root, option)
    except SourceError as error:
        raise ConfigError(str(error)) from None
    return spec
