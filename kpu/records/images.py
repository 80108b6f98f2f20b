"""What decoding found in every row, as committed below `images/`."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kpu.errors import CorruptError
from kpu.format.commits import ImagesRecord, ImageStatus
from kpu.format.plan import Plan
from kpu.records.plan import image_layouts
from kpu.records.units import Mask, load_images_record, mask_digest, open_committed
from kpu.shards.layout import ArrayLayout
from kpu.storage import paths
from kpu.storage.base import Storage

_STATUSES: Final = np.array([status.value for status in ImageStatus], np.uint8)


@dataclass(frozen=True)
class UnitImages:
    """Of a unit's n rows: digest uint8 [n, 16] of the encoded bytes, status uint8 [n], size int32 [n, 2] (H, W)."""

    digest: npt.NDArray[np.uint8]
    status: npt.NDArray[np.uint8]
    size: npt.NDArray[np.int32]

    @property
    def masked(self) -> Mask:
        """Rows that every teacher masks, bool [n]."""
        return np.not_equal(self.status, ImageStatus.OK)


def array_shard(name: str, unit: int, array: ArrayLayout) -> str:
    return array.key(f"{paths.IMAGES}/{name}", unit)


def load_images(storage: Storage, plan: Plan, unit: int) -> tuple[ImagesRecord, UnitImages] | None:
    """What is committed of a unit's images; None if nothing is.

    Raises:
        CorruptError: the record or a shard is damaged or missing.
    """
    record = load_images_record(storage, plan, unit)
    if record is None:
        return None
    images = UnitImages(**{name: _load_array(storage, plan, record, name) for name in paths.IMAGE_ARRAYS})
    _check_mask(record, images.masked, record.masked_digest)
    return record, images


def load_status(
    storage: Storage, plan: Plan, unit: int, masked_digest: str | None = None
) -> npt.NDArray[np.uint8] | None:
    """`images/status` of one unit, uint8 [n]; None if its images are not committed.

    `masked_digest` is what a teacher's commit record says of the masked rows, if there is one to compare with.

    Raises:
        CorruptError: the images record or its shard is damaged or missing, or masks other rows.
    """
    record = load_images_record(storage, plan, unit)
    if record is None:
        return None
    status = _load_array(storage, plan, record, "status")
    unknown = status[~np.isin(status, _STATUSES)]
    if unknown.size:
        reason = f"images/status: expected one of {_STATUSES.tolist()}, found {unknown[0]}"
        raise CorruptError(paths.commit(paths.IMAGES, unit), reason, unit=unit)
    _check_mask(record, status != ImageStatus.OK, masked_digest or record.masked_digest)
    return status


def _check_mask(record: ImagesRecord, masked: Mask, expected: str) -> None:
    if mask_digest(masked) != expected:
        reason = "images/status masks other rows than the commit record"
        raise CorruptError(paths.commit(paths.IMAGES, record.unit), reason, unit=record.unit)


def _load_array(storage: Storage, plan: Plan, record: ImagesRecord, name: str) -> npt.NDArray[Any]:
    array = image_layouts(plan.rows, plan.unit_rows)[name]
    key = array_shard(name, record.unit, array)
    reader = open_committed(storage, key, array, record.arrays[name], unit=record.unit)
    values = np.empty((reader.rows, *array.item_shape), array.dtype)
    reader.read(np.arange(len(values)), values)
    return values
