"""Reading commit records, and the masks in them."""

import re
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from kpu.errors import CorruptError, MissingUnitError
from kpu.format.base import Frozen
from kpu.format.commits import ImagesRecord, ShardRecord, UnitRecord
from kpu.format.plan import Plan
from kpu.records.teachers import GROUP, TeacherManifest
from kpu.shards.layout import ArrayLayout
from kpu.shards.reader import ShardReader, open_shard
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.util.digests import digest, open_document
from kpu.util.lru import LRUCache

Mask = npt.NDArray[np.bool_]
_NAME = re.compile(r"(\d{6,})\.json")
_Record = TypeVar("_Record", bound=Frozen)
_digests: LRUCache[int, tuple[Plan, str]] = LRUCache(8)


def plan_digest(plan: Plan) -> str:
    """`plan.digest`, computed once: every record repeats it, and a plan of 1e8 rows takes milliseconds."""
    return _digests.get(id(plan), lambda _: (plan, plan.digest))[1]  # holding the plan keeps its id from being reused


def committed_units(storage: Storage, folder: str, units: int) -> Mask:
    """Which units of `images` or of a teacher's folder are committed, bool [units], from the listing alone."""
    committed = np.zeros(units, dtype=bool)
    names = storage.names(f"{folder}/commits")
    found = [unit for name in names if (match := _NAME.fullmatch(name)) and (unit := int(match[1])) < units]
    committed[found] = True
    return committed


def units_left(storage: Storage, plan: Plan, teachers: Iterable[str]) -> dict[str, Mask]:
    """By teacher, which units it has not committed, bool [units], from the listings alone."""
    return {name: ~committed_units(storage, paths.teacher(name), plan.units) for name in teachers}


def lost_images(storage: Storage, plan: Plan, committed: dict[str, Mask]) -> dict[int, str]:
    """Units whose images are not committed though a teacher is, with its name; `committed` are units by teacher.

    The images are listed here, after the teachers: theirs are committed first.
    """
    lost = ~committed_units(storage, paths.IMAGES, plan.units)
    return {int(unit): name for name, units in reversed(committed.items()) for unit in np.flatnonzero(units & lost)}


def count_rows(plan: Plan, units: Mask) -> int:
    """How many rows the units that are marked in `units`, bool [units], have together."""
    lacking = plan.units * plan.unit_rows - plan.rows  # in the last unit
    return int(np.count_nonzero(units)) * plan.unit_rows - lacking * int(units[-1])


def load_record(storage: Storage, plan: Plan, teacher: str, unit: int) -> UnitRecord:
    """The commit record of one unit of a teacher.

    Raises:
        MissingUnitError: the unit is not committed.
        CorruptError: the record is damaged, or is of another unit, plan or teacher.
    """
    file = paths.commit(paths.teacher(teacher), unit)
    record = _load(storage, plan, UnitRecord, file, unit, teacher)
    if record is None:
        raise MissingUnitError(teacher, unit)
    if record.teacher != teacher:
        raise CorruptError(file, f"is of teacher {record.teacher!r}", unit=unit, teacher=teacher)
    return record


def load_unit(storage: Storage, plan: Plan, teacher: TeacherManifest, unit: int) -> UnitRecord:
    """As `load_record`, compared also with the published teacher."""
    name = teacher.spec.name
    record = load_record(storage, plan, name, unit)
    for problem in record_problems(record, teacher):
        raise CorruptError(paths.commit(paths.teacher(name), unit), problem, unit=unit, teacher=name)
    return record


def record_problems(record: UnitRecord, teacher: TeacherManifest) -> Iterator[str]:
    """How a record differs from what a unit of this teacher must say."""
    if record.fingerprint != teacher.fingerprint:
        yield f"is of another teacher version: expected fingerprint {teacher.fingerprint}, found {record.fingerprint}"
    if record.files != sealed_files(teacher):
        yield f"relies on other metadata: expected {sealed_files(teacher)}, found {record.files}"
    outputs = sorted(output.name for output in teacher.spec.outputs)
    if sorted(record.outputs) != outputs:
        yield f"describes other outputs: expected {outputs}, found {sorted(record.outputs)}"


def sealed_files(teacher: TeacherManifest) -> dict[str, str]:
    """What a unit record says of the teacher's files: the digest of its `zarr.json`, which digests all others."""
    return {GROUP: teacher.files[GROUP]}


def load_images_record(storage: Storage, plan: Plan, unit: int) -> ImagesRecord | None:
    """The images record of one unit; None if it is not committed.

    Raises:
        CorruptError: as `load_record`.
    """
    file = paths.commit(paths.IMAGES, unit)
    record = _load(storage, plan, ImagesRecord, file, unit, None)
    if record is not None and set(record.arrays) != set(paths.IMAGE_ARRAYS):
        reason = f"arrays: expected {list(paths.IMAGE_ARRAYS)}, found {sorted(record.arrays)}"
        raise CorruptError(file, reason, unit=unit)
    return record


def _load(
    storage: Storage, plan: Plan, kind: type[_Record], file: str, unit: int, teacher: str | None
) -> _Record | None:
    try:
        raw = storage.read(file)
    except FileNotFoundError:
        return None
    document = open_document(raw, file, unit=unit, teacher=teacher)
    del document["digest"]
    if document.get("unit") != unit or document.get("plan") != plan_digest(plan):
        found = (
            f"expected unit {unit} of plan {plan_digest(plan)}, found {document.get('unit')} of {document.get('plan')}"
        )
        raise CorruptError(file, found, unit=unit, teacher=teacher)
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise CorruptError(file, f"is not a commit record ({error})", unit=unit, teacher=teacher) from None


def mask_digest(masked: Mask) -> str:
    """What commit records say of the masked rows of a unit."""
    return digest(np.packbits(masked).tobytes())


def pack_mask(mask: Mask) -> str:
    """A mask as hexadecimal digits, first row = highest bit of the first digit, without trailing zeros."""
    return np.packbits(mask).tobytes().hex().rstrip("0")


def unpack_mask(digits: str, rows: int) -> Mask:
    """What `pack_mask` packed, bool [rows].

    Raises:
        ValueError: not hexadecimal digits, or rows beyond are marked.
    """
    width = 2 * -(-rows // 8)
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits.ljust(width, "0")), np.uint8))
    if bits[rows:].any():
        raise ValueError(f"mask {digits!r} marks rows beyond {rows}")
    return bits[:rows].astype(bool)


def nonfinite_rows(record: UnitRecord, file: str, rows: int) -> Mask:
    """Rows of the unit that this teacher alone masks, bool [rows]."""
    if not record.nonfinite:
        return np.zeros(rows, bool)
    try:
        return unpack_mask(record.nonfinite, rows)
    except ValueError as error:
        raise CorruptError(file, f"nonfinite: {error}", unit=record.unit, teacher=record.teacher) from None


def open_committed(
    storage: Storage, key: str, array: ArrayLayout, record: ShardRecord, *, unit: int, teacher: str | None = None
) -> ShardReader:
    """A reader of the shard that a commit record describes.

    Raises:
        CorruptError: the shard is missing, or is another one.
    """
    try:
        handle = storage.open(key)
    except FileNotFoundError:
        raise CorruptError(key, "is missing, though its unit is committed", unit=unit, teacher=teacher) from None
    return open_shard(handle, array, record, file=key, unit=unit, teacher=teacher)
