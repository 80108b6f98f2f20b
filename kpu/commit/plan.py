"""`plan.json` and the files that are published before it: group and image metadata, and the sample table."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from kpu.commit.conflicts import publishing
from kpu.errors import CorruptError, MismatchError, SourceError
from kpu.format.plan import FORMAT, VERSION, Plan
from kpu.records.plan import image_layouts, load_plan, read_plan, sample_digests
from kpu.records.samples import Fingerprint, write_part
from kpu.shards.zarr_metadata import array_metadata, group_metadata
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.util.digests import seal_document
from kpu.util.failpoints import failpoint


class Build(Protocol):
    """Builds the plan from what the source listing gave."""

    def __call__(
        self, *, fingerprint: str, samples: int, samples_digests: tuple[str, ...], metadata: dict[str, str]
    ) -> Plan: ...


def publish_plan(storage: Storage, parts: Iterator[pa.Table], build: Build, run: str, *, unit_rows: int) -> Plan:
    """Publish the sample table and the plan; the plan comes last and seals the rest.

    `parts` are tables of exactly 64 units of `unit_rows` rows, the last one shorter (see
    `kpu.records.samples.split_parts`). They are streamed: memory does not grow with their number. `build` makes the
    plan once they are counted. If an earlier run was interrupted before it published its plan, whatever it left that
    differs is moved into quarantine.

    Returns: the published plan, which may be another driver's that says the same.

    Raises:
        SourceError: there are no rows.
        MismatchError: another plan, or something that is not a cache, exists here.
    """
    refuse_foreign(storage)
    with publishing(storage, paths.PLAN, run, lambda: sealed_by_plan(storage)) as publish:
        plan = _publish_parts(parts, build, publish, unit_rows)
        document = {"format": FORMAT, "version": VERSION, "plan": plan.model_dump(mode="json")}
        won = storage.publish(paths.PLAN, seal_document(document), run=run)
        failpoint("plan.published")
    if won:
        return plan
    existing = load_plan(storage)
    if existing is None:
        raise CorruptError(paths.PLAN, "vanished while this run was planning")
    check_same_plan(existing, plan)
    return existing


def _publish_parts(
    parts: Iterator[pa.Table], build: Build, publish: Callable[[str, bytes], str], unit_rows: int
) -> Plan:
    """Publish everything that the plan seals, and build it."""
    metadata: dict[str, str] = {}
    metadata[paths.ROOT] = publish(paths.ROOT, group_metadata({"kpu": {"format": FORMAT, "version": VERSION}}))
    metadata[paths.TEACHERS] = publish(paths.TEACHERS, group_metadata({}))
    metadata[paths.group(paths.IMAGES)] = publish(paths.group(paths.IMAGES), group_metadata({}))

    fingerprint, rows, samples = Fingerprint(), 0, 0
    digests: list[str] = []
    for part in parts:
        if rows % (paths.UNITS_PER_PART * unit_rows) or not 0 < part.num_rows <= paths.UNITS_PER_PART * unit_rows:
            raise ValueError(f"a part has {part.num_rows} rows after {rows}: expected 64 units of {unit_rows} rows")
        fingerprint.update(part)
        digests.append(publish(paths.samples_part(len(digests)), write_part(part, unit_rows)))
        rows += part.num_rows
        samples += int(np.count_nonzero(part["view"].to_numpy() == 0))
    if not rows:
        raise SourceError("the source has no samples: expected at least one image")
    for name, array in image_layouts(rows, unit_rows).items():
        key = paths.group(f"{paths.IMAGES}/{name}")
        metadata[key] = publish(key, array_metadata(array, {}))
    failpoint("plan.samples")

    plan = build(
        fingerprint=fingerprint.hexdigest(), samples=samples, samples_digests=tuple(digests), metadata=metadata
    )
    if plan.rows != rows or plan.unit_rows != unit_rows:
        raise ValueError(f"the plan says {plan.rows} rows in units of {plan.unit_rows}: expected {rows}, {unit_rows}")
    return plan


def sealed_by_plan(storage: Storage) -> dict[str, str]:
    """Digests, by key, of the files that the published plan seals: metadata and the parts of the sample table."""
    plan = read_plan(storage)
    return {} if plan is None else plan.metadata | sample_digests(plan)


def refuse_foreign(storage: Storage) -> None:
    """Never move aside a Zarr hierarchy that is not a cache: somebody pointed `out` at their own data."""
    try:
        raw = storage.read(paths.ROOT)
    except FileNotFoundError:
        return
    if FORMAT.encode() not in raw:
        raise MismatchError(
            f"out: {storage.url} holds a zarr.json that is not of a {FORMAT}; expected an empty or new folder, or a "
            "cache; choose another `out`"
        )


def check_same_plan(existing: Plan, wanted: Plan) -> None:
    """Compare what decides rows and units; where the images lie and how many threads run may differ.

    Raises:
        MismatchError: naming the first field that differs.
    """
    for field in ("fingerprint", "samples", "views", "crop", "seed", "unit_rows", "classes"):
        _compare(f"plan field {field!r}", getattr(existing, field), getattr(wanted, field))
    _compare("source kind", existing.source.kind, wanted.source.kind)
    _compare("source options", existing.source.options, wanted.source.options)


def _compare(what: str, existing: Any, wanted: Any) -> None:
    if existing != wanted:
        raise MismatchError(
            f"{what}: this cache was made with {existing!r}, found {wanted!r}; the images or the settings have "
            "changed since: restore them, or choose another `out`"
        )
