"""Writing a cache as a dataset that Theia's own loader trains from."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from kpu.errors import ConfigError
from kpu.interop.convert import complete_teachers
from kpu.interop.theia.names import IMAGE, IMAGES, check_names, extension_of
from kpu.interop.theia.pictures import Pictures, dump_picture
from kpu.interop.theia.tensors import dump_features
from kpu.interop.theia.writer import Column, beside, publish_split, refuse_standing, written
from kpu.reading.cache import Cache, open_cache

_BATCH: Final = 64  # rows in memory at a time


@dataclass(frozen=True)
class TheiaExport:
    """What was written; `masked` rows were left out. `sizes` counts the distinct (H, W) of the images."""

    folder: str
    split: str
    teachers: tuple[str, ...]
    samples: int
    masked: int
    sizes: int


def export_theia(
    source: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    dataset: str,
    split: str,
    teachers: Sequence[str] = (),
    images: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TheiaExport:
    """Write one split of a dataset below the folder `root`.

    Rows that are masked for any of the teachers are left out of every column. Nothing has its final name
    before all of it is written.

    Args:
        source: a cache, complete for the teachers, each of which has a `patch`.
        root: a local folder; it is made where it is missing.
        dataset: its name below `root`.
        split: which nobody has written there.
        teachers: which; all where none is named.
        images: replaces the root that the cache remembers.
        progress: called with (rows done, rows in all).

    Raises:
        ConfigError: a name, a teacher or the place will not do, the split exists, or the folder of images does not.
        MismatchError, SourceError: the images are not those that were extracted, or cannot be read.
        CorruptError: the cache is damaged.
        StorageError: `root` cannot be written to.
    """
    check_names(dataset, split)
    if "://" in os.fspath(root):
        raise ConfigError(f"out: expected a local folder for a dataset of Theia's, found {os.fspath(root)}")
    cache = open_cache(source)
    names, pictures = _exportable(cache, complete_teachers(cache, teachers)), Pictures(cache, images)
    folder = Path(root).absolute() / dataset
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
    refuse_standing(folder, split)
    sizes: set[tuple[int, ...]] = set()
    with beside(folder, split) as place:
        with ExitStack() as stack:
            columns = {name: stack.enter_context(Column(place / name, dataset, split)) for name in [IMAGES, *names]}
            for unit in range(cache.plan.units):
                unit_rows = np.asarray(cache.plan.unit_range(unit))
                kept = unit_rows[np.logical_and.reduce([cache.valid(unit_rows, teacher=name) for name in names])]
                for start in range(0, len(kept), _BATCH):
                    sizes |= _write(cache, names, pictures, columns, kept[start : start + _BATCH])
                if progress:
                    progress(int(unit_rows[-1]) + 1, cache.rows)
        samples = columns[IMAGES].samples
        if not samples:
            raise ConfigError(f"{cache.path}: expected a row that no teacher masks, found none")
        publish_split(place, folder, split, list(columns), samples)
    return TheiaExport(str(folder), split, tuple(names), samples, cache.rows - samples, len(sizes))


def _exportable(cache: Cache, names: list[str]) -> list[str]:
    for name in names:
        outputs = cache.teachers[name].outputs
        if name == IMAGES:
            raise ConfigError(f"teacher {name!r}: Theia keeps images under this name; export the others with -t")
        if "patch" not in outputs or outputs["patch"].grid is None:
            raise ConfigError(
                f"teacher {name!r}: expected an output 'patch', which Theia's loader cannot do without, found "
                f"{sorted(outputs)}; choose the others with -t"
            )
    return names


def _write(
    cache: Cache,
    names: Sequence[str],
    pictures: Pictures,
    columns: dict[str, Column],
    rows: npt.NDArray[np.int64],
) -> set[tuple[int, ...]]:
    """Append rows to every column; the sizes of their images."""
    keys = [f"{row:012d}" for row in rows.tolist()]
    shown = pictures.read(rows)
    for key, pixels in zip(keys, shown, strict=True):
        columns[IMAGES].add(f"{key}.{IMAGE}", dump_picture(pixels))
    for name in names:
        outputs = cache.teachers[name].outputs
        patch_BTD = cache.read(name, "patch", rows)
        global_BD = cache.read(name, "global", rows) if "global" in outputs else None
        height, width = outputs["patch"].grid or (0, 0)
        for place, key in enumerate(keys):
            embedding = patch_BTD[place].T.reshape(-1, height, width)
            cls_token = None if global_BD is None else global_BD[place]
            columns[name].add(f"{key}.{extension_of(name)}", dump_features(embedding, cls_token))
    return {pixels.shape[:2] for pixels in shown}
