"""What decoding found in every row: the arrays below `images/`, committed with a unit's first teacher."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cache import layout
from cache.digests import seal_document
from cache.errors import CorruptError, MismatchError
from cache.failpoints import failpoint
from cache.plans import image_layouts
from cache.reasons import reason
from cache.records import Mask, load_images_record, mask_digest, open_committed, plan_digest
from cache.samples import Samples
from cache.settle import UnitShards
from cache.shards import ArrayLayout, Shard, encode_shard
from cache.spec import ImagesRecord, ImageStatus, Plan, ShardRecord
from cache.storage import Storage

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


def publish_images(
    storage: Storage, plan: Plan, unit: int, images: UnitImages, row_digest: str, run: str
) -> ImagesRecord:
    """Commit what decoding found in a unit; or compare it with what a former teacher's run committed.

    Raises:
        MismatchError: an image of the unit has other bytes, or decodes otherwise, than when it was committed.
    """
    marker = layout.commit(layout.IMAGES, unit)
    if storage.size(marker) is not None:
        return _compare(storage, plan, unit, images, row_digest)
    shards = UnitShards(storage, unit, marker, run)
    records: dict[str, ShardRecord] = {}
    for name, array in image_layouts(plan.rows, plan.unit_rows).items():
        values = getattr(images, name).astype(array.dtype, copy=False)

        def encode(values: npt.NDArray[Any] = values, array: ArrayLayout = array) -> Shard:
            return encode_shard(values, array, unit)

        def agree(standing: npt.NDArray[Any], values: npt.NDArray[Any] = values) -> bool:
            return np.array_equal(standing, values)

        settled = shards.publish(_shard(name, unit, array), array, encode, agree)
        if settled is None:
            _restore(storage, plan, unit, shards)
            return _compare(storage, plan, unit, images, row_digest)
        records[name] = settled.record
    record = ImagesRecord(
        unit=unit,
        plan=plan_digest(plan),
        row_digest=row_digest,
        masked=int(np.count_nonzero(images.masked)),
        masked_digest=mask_digest(images.masked),
        arrays=records,
    )
    won = storage.publish(marker, seal_document(record.model_dump(mode="json")), run=run)
    _restore(storage, plan, unit, shards)
    failpoint("unit.images")
    return record if won else _compare(storage, plan, unit, images, row_digest)


def _restore(storage: Storage, plan: Plan, unit: int, shards: UnitShards) -> None:
    record = load_images_record(storage, plan, unit)
    if record is None:
        raise CorruptError(layout.commit(layout.IMAGES, unit), "vanished while it was read", unit=unit)
    layouts = image_layouts(plan.rows, plan.unit_rows)
    shards.restore({_shard(name, unit, layouts[name]): shard for name, shard in record.arrays.items()})


def _shard(name: str, unit: int, array: ArrayLayout) -> str:
    return array.key(f"{layout.IMAGES}/{name}", unit)


def _compare(storage: Storage, plan: Plan, unit: int, images: UnitImages, row_digest: str) -> ImagesRecord:
    """The standing record, after its images were found to be ours."""
    standing = load_images(storage, plan, unit)
    if standing is None:
        raise CorruptError(layout.commit(layout.IMAGES, unit), "vanished while it was read", unit=unit)
    record, committed = standing
    if record.row_digest != row_digest:
        raise CorruptError(layout.commit(layout.IMAGES, unit), "is of other rows than the sample table's", unit=unit)
    changed = (committed.digest != images.digest).any(axis=1)
    decodes_otherwise = committed.masked != images.masked  # another release may mask a row for another reason
    for row in np.flatnonzero(changed | decodes_otherwise):
        number = plan.unit_range(unit)[int(row)]
        key = Samples(storage, plan).take([number])["key"][0].as_py()
        if changed[row]:
            expected, found = (value.digest[row].tobytes().hex() for value in (committed, images))
            what = f"its bytes changed since it was extracted: expected digest {expected}, found {found}"
        else:
            expected, found = (f"{reason(value.status[row])!r}" for value in (committed, images))
            what = (
                f"it decodes otherwise than when it was extracted: expected {expected}, found {found} (another release "
                "may read or refuse what an earlier one did not, or a plug-in of Pillow's is missing or new here)"
            )
        raise MismatchError(f"image {key!r} (row {number}): {what}; restore it, or extract into a new cache")
    return record


def load_images(storage: Storage, plan: Plan, unit: int) -> tuple[ImagesRecord, UnitImages] | None:
    """What is committed of a unit's images; None where nothing is.

    Raises:
        CorruptError: the record or a shard is damaged or missing.
    """
    record = load_images_record(storage, plan, unit)
    if record is None:
        return None
    images = UnitImages(**{name: _load_array(storage, plan, record, name) for name in layout.IMAGE_ARRAYS})
    _check_mask(record, images.masked, record.masked_digest)
    return record, images


def load_status(
    storage: Storage, plan: Plan, unit: int, masked_digest: str | None = None
) -> npt.NDArray[np.uint8] | None:
    """`images/status` of one unit, uint8 [n]; None where its images are not committed.

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
        raise CorruptError(layout.commit(layout.IMAGES, unit), reason, unit=unit)
    _check_mask(record, status != ImageStatus.OK, masked_digest or record.masked_digest)
    return status


def _check_mask(record: ImagesRecord, masked: Mask, expected: str) -> None:
    if mask_digest(masked) != expected:
        reason = "images/status masks other rows than the commit record"
        raise CorruptError(layout.commit(layout.IMAGES, record.unit), reason, unit=record.unit)


def _load_array(storage: Storage, plan: Plan, record: ImagesRecord, name: str) -> npt.NDArray[Any]:
    array = image_layouts(plan.rows, plan.unit_rows)[name]
    key = _shard(name, record.unit, array)
    reader = open_committed(storage, key, array, record.arrays[name], unit=record.unit)
    values = np.empty((reader.rows, *array.item_shape), array.dtype)
    reader.read(np.arange(len(values)), values)
    return values
