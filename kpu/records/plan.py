"""`plan.json`: the plan of a cache, read and checked with the metadata that it seals."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
from pydantic import ValidationError

from kpu.errors import CorruptError, NotACacheError
from kpu.format.commits import ImageStatus
from kpu.format.plan import FORMAT, VERSION, Plan
from kpu.shards.layout import ArrayLayout
from kpu.shards.zarr_metadata import array_layout
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.storage.found import describe_place
from kpu.util.digests import digest, open_document

MAX_CHUNK_ROWS = 64


MOST_UNIT_ROWS = 2**20


IMAGE_FOLDERS = (paths.IMAGES, *(f"{paths.IMAGES}/{name}" for name in paths.IMAGE_ARRAYS))


_IMAGE_ITEMS: dict[str, tuple[tuple[int, ...], str, int]] = {
    "digest": ((16,), "uint8", 0),
    "status": ((), "uint8", int(ImageStatus.NOT_WRITTEN)),
    "size": ((2,), "int32", 0),
}


def chunk_rows(unit_rows: int) -> int:
    """Rows in an inner chunk of arrays with small items: 64, or the most below it that divides a unit."""
    return math.gcd(MAX_CHUNK_ROWS, unit_rows)


def image_layouts(rows: int, unit_rows: int) -> dict[str, ArrayLayout]:
    """Layouts of `images/`: `digest` uint8 [rows, 16], `status` uint8 [rows], `size` int32 [rows, 2]."""
    return {
        name: ArrayLayout(
            rows=rows,
            unit_rows=unit_rows,
            chunk_rows=chunk_rows(unit_rows),
            item_shape=item_shape,
            dtype=np.dtype(dtype),
            fill=fill,
            packing="bytes",
        )
        for name, (item_shape, dtype, fill) in _IMAGE_ITEMS.items()
    }


def sample_digests(plan: Plan) -> dict[str, str]:
    """Digests of the parts of the sample table, by key."""
    return {paths.samples_part(part): found for part, found in enumerate(plan.samples_digests)}


def read_plan(storage: Storage) -> Plan | None:
    """The plan alone; None if there is none.

    Raises:
        CorruptError: any byte of it differs from what was published.
        NotACacheError: it is of a format version that this release cannot read.
    """
    try:
        raw = storage.read(paths.PLAN)
    except FileNotFoundError:
        return None
    document = open_document(raw, paths.PLAN)
    found = (document.get("format"), document.get("version"))
    if found != (FORMAT, VERSION):
        raise NotACacheError(
            f"{storage.url}: {paths.PLAN} is of format {found[0]!r} version {found[1]!r}; this release reads "
            f"{FORMAT!r} version {VERSION}; use the release that wrote it"
        )
    try:
        plan = Plan.model_validate(document.get("plan"))
    except ValidationError as error:
        raise CorruptError(paths.PLAN, f"holds no valid plan ({error})") from None
    for problem in _plan_problems(plan):
        raise CorruptError(paths.PLAN, problem)
    return plan


def _plan_problems(plan: Plan) -> Iterator[str]:
    """Numbers of a plan that are out of bounds, or contradict each other."""
    bounds = {"samples": 2**40, "views": 2**16, "unit_rows": MOST_UNIT_ROWS, "threads": 2**16}
    for field, most in bounds.items():
        value = getattr(plan, field)
        if not 1 <= value <= most:
            yield f"{field}: expected a number from 1 to {most}, found {value}"
            return
    if not 0 <= plan.seed < 2**63:
        yield f"seed: expected a number from 0 to {2**63 - 1}, found {plan.seed}"
    parts = -(-plan.units // paths.UNITS_PER_PART)
    if len(plan.samples_digests) != parts:
        yield (
            f"samples_digests: expected {parts} files for {plan.rows} rows in units of {plan.unit_rows}, found "
            f"{len(plan.samples_digests)}"
        )
    missing = {paths.ROOT, paths.TEACHERS, *map(paths.group, IMAGE_FOLDERS)} - plan.metadata.keys()
    if missing:
        yield f"metadata: expected digests of {sorted(missing)} among them, found {sorted(plan.metadata)}"


def require_plan(storage: Storage) -> Plan:
    """As `load_plan`, for whoever needs one.

    Raises:
        NotACacheError: there is none; the message says what is there instead.
    """
    plan = load_plan(storage)
    if plan is None:
        raise not_a_cache(storage.url)
    return plan


def not_a_cache(url: str) -> NotACacheError:
    """The error for a location without a plan."""
    return NotACacheError(
        f"{url}: expected a cache, found {describe_place(url)}; check the path, or make one with `kpu-cache extract`"
    )


def load_plan(storage: Storage) -> Plan | None:
    """The plan, with the metadata files that it digests checked; None if there is none.

    Raises:
        CorruptError: the plan or one of those files is damaged or missing.
        NotACacheError: the plan is of a format version that this release cannot read.
    """
    plan = read_plan(storage)
    if plan is not None:
        raw = {file: read_checked(storage, file, expected) for file, expected in plan.metadata.items()}
        check_image_arrays(plan, raw)
    return plan


def check_image_arrays(plan: Plan, raw: Mapping[str, bytes]) -> None:
    """Compare the metadata of the arrays below `images/`, from their bytes by file, with what the plan makes of them.

    Raises:
        CorruptError: an array has another shape, dtype or codec.
    """
    for name, expected in image_layouts(plan.rows, plan.unit_rows).items():
        file = paths.group(f"{paths.IMAGES}/{name}")
        found, _ = array_layout(raw[file], file)
        if found != expected:
            raise CorruptError(file, f"does not fit the plan: expected {expected}, found {found}")


def read_checked(storage: Storage, file: str, expected: str, *, teacher: str | None = None) -> bytes:
    """A whole file whose digest is known.

    Raises:
        CorruptError: it is missing, or its bytes are others.
    """
    try:
        raw = storage.read(file)
    except FileNotFoundError:
        raise CorruptError(file, "is missing", teacher=teacher) from None
    found = digest(raw)
    if found != expected:
        raise CorruptError(file, f"is damaged: expected digest {expected}, found {found}", teacher=teacher)
    return raw
