"""Compare the images of a unit with those that are committed already."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kpu.errors import CorruptError, MismatchError
from kpu.format.commits import ImagesRecord
from kpu.format.plan import Plan
from kpu.format.reasons import reason
from kpu.records.images import UnitImages, load_images
from kpu.records.samples import Samples
from kpu.shards.layout import ArrayLayout, Shard
from kpu.shards.writer import encode_shard
from kpu.storage import paths
from kpu.storage.base import Storage


@dataclass(frozen=True)
class ImageShard:
    """One array of `images/` for one unit, to be published; accepts equal values only."""

    values: npt.NDArray[Any]
    layout: ArrayLayout
    unit: int

    def encode(self) -> Shard:
        return encode_shard(self.values, self.layout, self.unit)

    def accepts(self, values: npt.NDArray[Any]) -> bool:
        return np.array_equal(values, self.values)


def compare_images(
    storage: Storage, plan: Plan, unit: int, images: UnitImages, row_digest: str
) -> tuple[ImagesRecord, UnitImages]:
    """What is committed of a unit's images, after it was found equal to `images`.

    Raises:
        MismatchError: an image has other bytes, or decodes differently, than when it was committed.
        CorruptError: the record is damaged, or is of other rows.
    """
    marker = paths.commit(paths.IMAGES, unit)
    found = load_images(storage, plan, unit)
    if found is None:
        raise CorruptError(marker, "vanished while it was read", unit=unit)
    record, committed = found
    if record.row_digest != row_digest:
        raise CorruptError(marker, "is of other rows than the sample table's", unit=unit)
    changed = (committed.digest != images.digest).any(axis=1)
    decodes_otherwise = committed.masked != images.masked  # another release may mask a row for another reason
    for row in np.flatnonzero(changed | decodes_otherwise):
        number = plan.unit_range(unit)[int(row)]
        key = Samples(storage, plan).take([number])["key"][0].as_py()
        if changed[row]:
            expected, actual = (value.digest[row].tobytes().hex() for value in (committed, images))
            what = f"its bytes changed since it was extracted: expected digest {expected}, found {actual}"
        else:
            expected, actual = (f"{reason(value.status[row])!r}" for value in (committed, images))
            what = (
                f"it decodes otherwise than when it was extracted: expected {expected}, found {actual} (another "
                "release may read or refuse what an earlier one did not, or a plug-in of Pillow's was added or removed)"
            )
        raise MismatchError(f"image {key!r} (row {number}): {what}; restore it, or extract into a new cache")
    return record, committed
