"""`plan.json` and everything that must stand before it: group and image metadata, and the sample table."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from cache import layout
from cache.arrays import array_layout, array_metadata, group_metadata
from cache.digests import digest, open_document, seal_document
from cache.errors import CorruptError, MismatchError, NotACacheError, SourceError
from cache.failpoints import failpoint
from cache.samples import Fingerprint, write_part
from cache.settle import settling
from cache.shards import ArrayLayout
from cache.spec import FORMAT, VERSION, ImageStatus, Plan
from cache.storage import Storage

MAX_CHUNK_ROWS = 64
MOST_UNIT_ROWS = 2**20
IMAGE_FOLDERS = (layout.IMAGES, *(f"{layout.IMAGES}/{name}" for name in layout.IMAGE_ARRAYS))

_IMAGE_ITEMS: dict[str, tuple[tuple[int, ...], str, int]] = {
    "digest": ((16,), "uint8", 0),
    "status": ((), "uint8", int(ImageStatus.NOT_WRITTEN)),
    "size": ((2,), "int32", 0),
}


def chunk_rows(unit_rows: int) -> int:
    """Rows in an inner chunk of arrays with small items: 64, or the most below it that divides a unit."""
    return math.gcd(MAX_CHUNK_ROWS, unit_rows)


class Build(Protocol):
    """Makes the plan of what only the listing tells."""

    def __call__(
        self, *, fingerprint: str, samples: int, samples_digests: tuple[str, ...], metadata: dict[str, str]
    ) -> Plan: ...


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


def publish_plan(storage: Storage, parts: Iterator[pa.Table], build: Build, run: str, *, unit_rows: int) -> Plan:
    """Publish the sample table and the plan; the plan comes last and seals the rest.

    `parts` are tables of exactly 64 units of `unit_rows` rows, the last one shorter (`cache.samples.split_parts` cuts
    them). They are streamed: memory does not grow with their number. `build` makes the plan once
    they are counted. Where a run was interrupted before its plan stood, whatever it
    left that differs is moved into quarantine.

    Returns: the plan that stands, which may be another driver's where it says the same.

    Raises:
        SourceError: there are no rows.
        MismatchError: another plan, or something that is no cache of ours, stands here.
    """
    refuse_foreign(storage)
    with settling(storage, layout.PLAN, run, lambda: sealed_by_plan(storage)) as settle:
        plan = _settle_parts(parts, build, settle, unit_rows)
        document = {"format": FORMAT, "version": VERSION, "plan": plan.model_dump(mode="json")}
        won = storage.publish(layout.PLAN, seal_document(document), run=run)
        failpoint("plan.published")
    if won:
        return plan
    standing = load_plan(storage)
    if standing is None:
        raise CorruptError(layout.PLAN, "vanished while this run was planning")
    check_same_plan(standing, plan)
    return standing


def _settle_parts(parts: Iterator[pa.Table], build: Build, settle: Callable[[str, bytes], str], unit_rows: int) -> Plan:
    """Publish by `settle` all that the plan seals, and make it."""
    metadata: dict[str, str] = {}
    metadata[layout.ROOT] = settle(layout.ROOT, group_metadata({"kpu": {"format": FORMAT, "version": VERSION}}))
    metadata[layout.TEACHERS] = settle(layout.TEACHERS, group_metadata({}))
    metadata[layout.group(layout.IMAGES)] = settle(layout.group(layout.IMAGES), group_metadata({}))

    fingerprint, rows, samples = Fingerprint(), 0, 0
    digests: list[str] = []
    for part in parts:
        if rows % (layout.UNITS_PER_PART * unit_rows) or not 0 < part.num_rows <= layout.UNITS_PER_PART * unit_rows:
            raise ValueError(f"a part has {part.num_rows} rows after {rows}: expected 64 units of {unit_rows} rows")
        fingerprint.update(part)
        digests.append(settle(layout.samples_part(len(digests)), write_part(part, unit_rows)))
        rows += part.num_rows
        samples += int(np.count_nonzero(part["view"].to_numpy() == 0))
    if not rows:
        raise SourceError("the source has no samples: expected at least one image")
    for name, array in image_layouts(rows, unit_rows).items():
        key = layout.group(f"{layout.IMAGES}/{name}")
        metadata[key] = settle(key, array_metadata(array, {}))
    failpoint("plan.samples")

    plan = build(
        fingerprint=fingerprint.hexdigest(), samples=samples, samples_digests=tuple(digests), metadata=metadata
    )
    if plan.rows != rows or plan.unit_rows != unit_rows:
        raise ValueError(f"the plan says {plan.rows} rows in units of {plan.unit_rows}: expected {rows}, {unit_rows}")
    return plan


def sealed_by_plan(storage: Storage) -> dict[str, str]:
    """Digests, by key, of what the plan that stands seals: metadata and the parts of the sample table."""
    plan = read_plan(storage)
    return {} if plan is None else plan.metadata | sample_digests(plan)


def sample_digests(plan: Plan) -> dict[str, str]:
    """Digests of the parts of the sample table, by key."""
    return {layout.samples_part(part): found for part, found in enumerate(plan.samples_digests)}


def refuse_foreign(storage: Storage) -> None:
    """Never move aside a Zarr hierarchy that is not a cache: somebody pointed `out` at their own data."""
    try:
        raw = storage.read(layout.ROOT)
    except FileNotFoundError:
        return
    if FORMAT.encode() not in raw:
        raise MismatchError(
            f"out: {storage.url} holds a zarr.json that is not of a {FORMAT}; expected an empty or new folder, or a "
            "cache; choose another `out`"
        )


def check_same_plan(standing: Plan, wanted: Plan) -> None:
    """Compare what decides rows and units; where the images lie and how many threads run may differ.

    Raises:
        MismatchError: naming the first field that differs.
    """
    for field in ("fingerprint", "samples", "views", "crop", "seed", "unit_rows", "classes"):
        _compare(f"plan field {field!r}", getattr(standing, field), getattr(wanted, field))
    _compare("source kind", standing.source.kind, wanted.source.kind)
    _compare("source options", standing.source.options, wanted.source.options)


def _compare(what: str, standing: Any, wanted: Any) -> None:
    if standing != wanted:
        raise MismatchError(
            f"{what}: this cache was made with {standing!r}, found {wanted!r}; the images or the settings have "
            "changed since: restore them, or choose another `out`"
        )


def read_plan(storage: Storage) -> Plan | None:
    """The plan alone; None where there is none.

    Raises:
        CorruptError: any byte of it differs from what was published.
        NotACacheError: it is of a format version that this release cannot read.
    """
    try:
        raw = storage.read(layout.PLAN)
    except FileNotFoundError:
        return None
    document = open_document(raw, layout.PLAN)
    found = (document.get("format"), document.get("version"))
    if found != (FORMAT, VERSION):
        raise NotACacheError(
            f"{storage.url}: {layout.PLAN} is of format {found[0]!r} version {found[1]!r}; this release reads "
            f"{FORMAT!r} version {VERSION}; use the release that wrote it"
        )
    try:
        plan = Plan.model_validate(document.get("plan"))
    except ValidationError as error:
        raise CorruptError(layout.PLAN, f"holds no valid plan ({error})") from None
    for problem in _plan_problems(plan):
        raise CorruptError(layout.PLAN, problem)
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
    parts = -(-plan.units // layout.UNITS_PER_PART)
    if len(plan.samples_digests) != parts:
        yield (
            f"samples_digests: expected {parts} files for {plan.rows} rows in units of {plan.unit_rows}, found "
            f"{len(plan.samples_digests)}"
        )
    missing = {layout.ROOT, layout.TEACHERS, *map(layout.group, IMAGE_FOLDERS)} - plan.metadata.keys()
    if missing:
        yield f"metadata: expected digests of {sorted(missing)} among them, found {sorted(plan.metadata)}"


def load_plan(storage: Storage) -> Plan | None:
    """The plan, with the metadata files that it digests checked; None where there is none.

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
        file = layout.group(f"{layout.IMAGES}/{name}")
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
