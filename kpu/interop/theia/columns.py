"""The columns of one split of a dataset, held together by their keys: Theia's own loader joins them by position."""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kpu.errors import SourceError
from kpu.interop.theia.names import IMAGE, IMAGES, SPLITS, extension_of, is_tar_of, parse_splits
from kpu.interop.theia.tensors import SampleFeatures, load_features
from kpu.sources import ImageSource, open_source
from kpu.sources.files import Files, Piece, file_system
from kpu.sources.keys import unique_keys
from kpu.sources.tables import BATCH_ROWS
from kpu.sources.tars.grouping import split_name
from kpu.sources.tars.headers import members

Shapes = tuple[tuple[int, ...], tuple[int, ...] | None, str]


class ColumnEntry(NamedTuple):
    """One sample of a column: its key, and where its bytes lie. `tar` is relative to the dataset's folder."""

    key: str
    tar: str
    offset: int
    length: int


@dataclass(frozen=True)
class _Tars:
    """What `open_source` wants to know of the images."""

    source: tuple[str, ...]
    image: str | None = IMAGE
    label: str | None = None
    key: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Dataset:
    """One split as it was found. `images` lists its samples as an extraction would; `models` are tars by folder."""

    files: Files
    split: str
    images: ImageSource
    models: dict[str, tuple[str, ...]]

    def image_entries(self) -> Iterator[ColumnEntry]:
        """The samples of the column of images, in order."""
        for batch in self.images.batches():
            columns = (batch.column(name).to_pylist() for name in ("key", "file", "offset", "length"))
            for key, tar, offset, length in zip(*columns, strict=True):
                yield ColumnEntry(key.removeprefix(f"{tar.removesuffix('.tar')}/"), f"{IMAGES}/{tar}", offset, length)

    def entries(self, model: str) -> Iterator[ColumnEntry]:
        """The samples of a model's column, in order; members of other names are passed over, as Theia does."""
        for tar in self.models[model]:
            for member in members(self.files, tar):
                key, extension = split_name(member.name)
                if key is not None and extension == extension_of(model):
                    yield ColumnEntry(key, tar, member.offset, member.length)

    def place(self, model: str, entry: ColumnEntry) -> str:
        """Tar and member, for messages."""
        name = IMAGE if model == IMAGES else extension_of(model)
        return f"{self.files.name(entry.tar)}, member '{entry.key}.{name}' at offset {entry.offset}"


def find_dataset(folder: str, split: str) -> Dataset:
    """Look at the dataset in `folder`, an absolute path or a URL, without opening a tar.

    Raises:
        SourceError: there is none, or it lacks images or features of this split.
    """
    system, inner = file_system(folder)
    found: dict[str, tuple[str, ...]] = {}
    try:
        for item in system.ls(inner, detail=True):
            column = posixpath.basename(item["name"].rstrip("/"))
            if item["type"] == "directory" and not column.startswith("."):
                names = sorted(posixpath.basename(name) for name in system.ls(item["name"], detail=False))
                found[column] = tuple(f"{column}/{name}" for name in names if is_tar_of(name, split))
    except Exception as error:  # clients raise errors of their own: no credentials, no network, no bucket
        raise SourceError(f"{folder}: expected a dataset of Theia's, cannot list it: {error}") from None
    models = {column: found[column] for column in sorted(found) if found[column] and column != IMAGES}
    if not found.get(IMAGES) or not models:
        raise SourceError(
            f"{folder}: expected tars *-{split}.tar in a folder {IMAGES} and in one for each model, found them in "
            f"{sorted(column for column in found if found[column]) or 'none'} of {sorted(found)}; check the dataset "
            "and the split"
        )
    tars = tuple(f"{folder.rstrip('/')}/{tar}" for tar in found[IMAGES])
    return Dataset(Files(folder), split, open_source(_Tars(tars)), models)


def check_keys(dataset: Dataset) -> int:
    """Hold the keys of every column against those of the images, in order; how many samples there are.

    Raises:
        SourceError: a key differs, is missing, repeats, or a tar is damaged or cut short.
    """
    samples = 0

    def listing() -> Iterator[pa.RecordBatch]:
        nonlocal samples
        samples, waiting = 0, list[ColumnEntry]()
        for entry in _agreeing(dataset):
            samples += 1
            waiting.append(entry)
            if len(waiting) == BATCH_ROWS:
                yield _batch(waiting)
                waiting.clear()
        if waiting:
            yield _batch(waiting)

    for _ in unique_keys(listing):
        pass
    return samples


def _agreeing(dataset: Dataset) -> Iterator[ColumnEntry]:
    """The entries of the images, each once every column was found to have its key at this place."""
    names = [IMAGES, *dataset.models]
    streams = [dataset.image_entries(), *(dataset.entries(model) for model in dataset.models)]
    for row, found in enumerate(zip_longest(*streams)):
        keys = {None if entry is None else entry.key for entry in found}
        if len(keys) > 1:
            other = next(place for place, entry in enumerate(found) if _key(entry) != _key(found[0]))
            where = [_described(dataset, names[place], found[place]) for place in (0, other)]
            raise SourceError(
                f"sample {row}: expected the same key in every column, found {where[0]}, but {where[1]}; Theia joins "
                "columns by position, so from here on features would be those of other images: make the column anew"
            )
        yield found[0]


def _key(entry: ColumnEntry | None) -> str | None:
    return None if entry is None else entry.key


def _described(dataset: Dataset, column: str, entry: ColumnEntry | None) -> str:
    if entry is None:
        return f"the end of {dataset.files.name(column)}"
    return f"{entry.key!r} in {dataset.place(column, entry)}"


def _batch(entries: Sequence[ColumnEntry]) -> pa.RecordBatch:
    keys, tars, offsets, lengths = (list(column) for column in zip(*entries, strict=True))
    return pa.RecordBatch.from_pydict({"key": keys, "file": tars, "offset": offsets, "length": lengths})


def check_count(dataset: Dataset, samples: int) -> None:
    """Hold the number of samples against `splits.json`, where that names the split.

    Raises:
        SourceError: they differ: tars are missing from every column.
        CorruptError: `splits.json` is not to be understood.
    """
    try:
        raw = dataset.files.fetch([Piece(SPLITS, SPLITS)])[0]
    except SourceError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return
        raise
    expected = parse_splits(raw, dataset.files.name(SPLITS)).get(dataset.split, samples)
    if expected != samples:
        raise SourceError(
            f"{dataset.files.name(SPLITS)}: expected {expected!r} samples of {dataset.split!r}, found {samples} in the "
            "tars; fetch the tars that are missing, or correct the number"
        )


class FeatureReader:
    """Features of one model; every file must have the shapes and the dtype of the first."""

    def __init__(self, dataset: Dataset, model: str) -> None:
        self._dataset, self.model = dataset, model
        first = next(dataset.entries(model), None)
        if first is None:
            raise SourceError(
                f"{dataset.files.name(model)}: expected members <key>.{extension_of(model)}, found none in "
                f"{len(dataset.models[model])} tars; rename the folder after the model, with '_' for '/'"
            )
        self.shapes: Final = _shapes(self._parse(first, self._fetch([first])[0]))
        """Of `embedding` and `cls_token`, and the dtype of both."""

    def read(self, entries: Sequence[ColumnEntry]) -> dict[str, npt.NDArray[np.float32]]:
        """`patch` float32 [n, H * W, C] and, if there is one, `global` float32 [n, C].

        Raises:
            SourceError: naming tar and member: not a sound file, other shapes, or a value that is not finite.
        """
        (channels, height, width), vector, _ = self.shapes
        found = {"patch": np.empty((len(entries), height * width, channels), np.float32)}
        if vector is not None:
            found["global"] = np.empty((len(entries), *vector), np.float32)
        for place, (entry, raw) in enumerate(zip(entries, self._fetch(entries), strict=True)):
            features = self._parse(entry, raw)
            if _shapes(features) != self.shapes:
                raise self._error(entry, f"expected {self.shapes} as in the first, found {_shapes(features)}")
            found["patch"][place] = features.embedding.reshape(channels, -1).T
            if features.cls_token is not None:
                found["global"][place] = features.cls_token
            if not all(np.isfinite(values[place]).all() for values in found.values()):
                raise self._error(entry, "expected finite values, found NaN or infinity")
        return found

    def _fetch(self, entries: Sequence[ColumnEntry]) -> list[bytes]:
        return self._dataset.files.fetch([Piece(e.tar, e.key, e.offset, e.length) for e in entries])

    def _parse(self, entry: ColumnEntry, raw: bytes) -> SampleFeatures:
        try:
            return load_features(raw)
        except ValueError as error:
            raise self._error(entry, str(error)) from None

    def _error(self, entry: ColumnEntry, reason: str) -> SourceError:
        return SourceError(f"{self._dataset.place(self.model, entry)}: {reason}; make the column anew")


def _shapes(features: SampleFeatures) -> Shapes:
    vector = None if features.cls_token is None else features.cls_token.shape
    return features.embedding.shape, vector, features.dtype
