"""What decoding found in every row: the arrays below `images/`, committed with a unit's first teacher."""

from typing import Any

import numpy as np
import numpy.typing as npt

from kpu.commit.conflicts import UnitShards
from kpu.errors import CorruptError, MismatchError
from kpu.format.reasons import reason
from kpu.format.spec import ImagesRecord, Plan, ShardRecord
from kpu.records.images import UnitImages, array_shard, load_images
from kpu.records.plan import image_layouts
from kpu.records.samples import Samples
from kpu.records.units import load_images_record, mask_digest, plan_digest
from kpu.shards.layout import ArrayLayout, Shard
from kpu.shards.writer import encode_shard
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.util.digests import seal_document
from kpu.util.failpoints import failpoint


def publish_images(
    storage: Storage, plan: Plan, unit: int, images: UnitImages, row_digest: str, run: str
) -> ImagesRecord:
    """Commit what decoding found in a unit; or compare it with what a former teacher's run committed.

    Raises:
        MismatchError: an image of the unit has other bytes, or decodes otherwise, than when it was committed.
    """
    marker = paths.commit(paths.IMAGES, unit)
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

        settled = shards.publish(array_shard(name, unit, array), array, encode, agree)
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
        raise CorruptError(paths.commit(paths.IMAGES, unit), "vanished while it was read", unit=unit)
    layouts = image_layouts(plan.rows, plan.unit_rows)
    shards.restore({array_shard(name, unit, layouts[name]): shard for name, shard in record.arrays.items()})


def _compare(storage: Storage, plan: Plan, unit: int, images: UnitImages, row_digest: str) -> ImagesRecord:
    """The standing record, after its images were found to be ours."""
    standing = load_images(storage, plan, unit)
    if standing is None:
        raise CorruptError(paths.commit(paths.IMAGES, unit), "vanished while it was read", unit=unit)
    record, committed = standing
    if record.row_digest != row_digest:
        raise CorruptError(paths.commit(paths.IMAGES, unit), "is of other rows than the sample table's", unit=unit)
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
