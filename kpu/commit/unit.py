"""Committing a unit of a teacher: shards first, its record last. This is what makes the unit part of the cache."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kpu.commit.conflicts import UnitShards
from kpu.errors import MismatchError
from kpu.format.fidelity import RowFidelity, summarise
from kpu.format.spec import OutputRecord, OutputSpec, Plan, UnitRecord
from kpu.records.teachers import PublishedTeacher, output_shard
from kpu.records.units import (
    Mask,
    load_images_record,
    load_unit,
    mask_digest,
    pack_mask,
    plan_digest,
    sealed_files,
)
from kpu.shards.layout import ArrayLayout, Shard
from kpu.shards.writer import encode_shard
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.util.digests import seal_document
from kpu.util.failpoints import failpoint

# Two lossless encodings agree within this many channel standard deviations, or within one step of the number format.
LOSSLESS_TOLERANCE: Final = 1e-2
FORMAT_STEP: Final = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}
Remeasure = Callable[[str, npt.NDArray[Any]], RowFidelity]
Encode = Callable[[npt.NDArray[Any], ArrayLayout, int], Shard]


@dataclass(frozen=True)
class EncodedOutput:
    """One output of one unit: `stored` [n, ...] as the grid encodes it, and what that cost in each row."""

    stored: npt.NDArray[Any]
    rows: RowFidelity


def publish_unit(
    storage: Storage,
    plan: Plan,
    teacher: PublishedTeacher,
    unit: int,
    outputs: Mapping[str, EncodedOutput],
    valid: Mask,
    nonfinite: Mask,
    row_digest: str,
    run: str,
    *,
    remeasure: Remeasure,
    encode: Encode = encode_shard,
) -> UnitRecord:
    """Publish a unit's shards and then its commit record; or return the record that stands already.

    Args:
        storage: the cache.
        plan: of the cache.
        teacher: as published.
        unit: whose images are committed already.
        outputs: of every output of the teacher, for the unit's n rows.
        valid: bool [n], False where the image is masked.
        nonfinite: bool [n], True where this teacher alone masks the row.
        row_digest: of the unit's keys and views.
        run: whose temporary folder is used.
        remeasure: `remeasure(output, stored)` gives the fidelity of stored values other than ours, which another
            worker published before us and which agree with ours.
        encode: makes the bytes of a shard; to be timed, or given threads.

    Raises:
        MismatchError: the images record of the unit is missing, or is of other rows or masks.
    """
    folder = paths.teacher(teacher.spec.name)
    marker = paths.commit(folder, unit)
    if storage.size(marker) is not None:
        return load_unit(storage, plan, teacher, unit)
    masked = ~(valid | nonfinite)
    _check_images(storage, plan, unit, masked, row_digest)
    shards = UnitShards(storage, unit, marker, run)
    records: dict[str, OutputRecord] = {}
    for output in teacher.spec.outputs:
        ours = outputs[output.name]
        record = _publish_output(shards, plan, teacher, output, unit, ours, valid & ~nonfinite, remeasure, encode)
        if record is None:
            return _restored(shards, teacher, load_unit(storage, plan, teacher, unit))
        records[output.name] = record
    failpoint("unit.shards")
    unit_record = UnitRecord(
        unit=unit,
        plan=plan_digest(plan),
        row_digest=row_digest,
        teacher=teacher.spec.name,
        fingerprint=teacher.fingerprint,
        files=sealed_files(teacher),
        masked=int(np.count_nonzero(masked)),
        masked_digest=mask_digest(masked),
        nonfinite=pack_mask(nonfinite),
        outputs=records,
    )
    if not storage.publish(marker, seal_document(unit_record.model_dump(mode="json")), run=run):
        unit_record = load_unit(storage, plan, teacher, unit)
    _restored(shards, teacher, unit_record)
    failpoint("unit.committed")
    return unit_record


def _restored(shards: UnitShards, teacher: PublishedTeacher, record: UnitRecord) -> UnitRecord:
    outputs = {output.name: output for output in teacher.spec.outputs}
    shards.restore({output_shard(teacher, outputs[name], record.unit): out for name, out in record.outputs.items()})
    return record


def _publish_output(
    shards: UnitShards,
    plan: Plan,
    teacher: PublishedTeacher,
    output: OutputSpec,
    unit: int,
    ours: EncodedOutput,
    valid: Mask,
    remeasure: Remeasure,
    encode: Encode,
) -> OutputRecord | None:
    """Publish one shard and say what stands; None where the unit turns out to be committed with another one."""
    array = teacher.layouts[output.name]
    stored = ours.stored
    if not valid.all():
        stored = stored.copy()
        stored[~valid] = array.fill

    def is_ours(standing: npt.NDArray[Any]) -> bool:
        return agree(teacher, output.name, standing, stored, valid)

    settled = shards.publish(output_shard(teacher, output, unit), array, lambda: encode(stored, array, unit), is_ours)
    if settled is None:
        return None
    rows = ours.rows if settled.values is None else remeasure(output.name, settled.values)
    fidelity = summarise(rows, valid, plan.unit_range(unit).start)
    return OutputRecord(bytes=settled.record.bytes, seal=settled.record.seal, fidelity=fidelity)


def _check_images(storage: Storage, plan: Plan, unit: int, masked: Mask, row_digest: str) -> None:
    images = load_images_record(storage, plan, unit)
    expected = (images.row_digest, images.masked_digest) if images else None
    found = (row_digest, mask_digest(masked))
    if expected != found:
        raise MismatchError(
            f"unit {unit}: expected the rows and masks of {paths.commit(paths.IMAGES, unit)} {expected}, found "
            f"{found}; the images are committed first and decide which rows are masked"
        )


def agree(
    teacher: PublishedTeacher, name: str, standing: npt.NDArray[Any], ours: npt.NDArray[Any], valid: Mask
) -> bool:
    """Whether stored rows [n, ...] of output `name` are masked alike, and within one grid step where `valid` [n].

    Lossless codecs have no step: LOSSLESS_TOLERANCE.
    """
    grid, fill, std = teacher.grids[name], teacher.layouts[name].fill, teacher.statistics[name].std
    for row in range(len(ours)):  # one at a time: the differences of a whole shard would fill the memory
        if not valid[row]:
            if not np.array_equal(standing[row], ours[row], equal_nan=ours.dtype.kind == "f"):
                return False
        elif grid.on_grid:
            steps, own_steps = (grid.steps(each[row]).astype(np.int32) for each in (standing, ours))
            if (standing[row] == fill).any() or np.abs(steps - own_steps).max() > 1:
                return False
        else:
            there, here = grid.decode(standing[row]), grid.decode(ours[row])
            tolerance = np.maximum(LOSSLESS_TOLERANCE * std, FORMAT_STEP[grid.codec.name] * np.abs(here))
            if not (np.abs(there - here) <= tolerance).all():
                return False
    return True
