"""Publishing a teacher: statistics, head, array metadata, and last the `zarr.json` that seals them and its spec."""

import json
from collections.abc import Callable, Iterator
from typing import Any, Final

from kpu.commit.conflicts import publishing
from kpu.errors import CorruptError, MismatchError
from kpu.format.codecs import QuantGrid, make_grid
from kpu.format.plan import Plan
from kpu.format.statistics import Statistics, dump_statistics, load_statistics
from kpu.format.teacher import TeacherSpec
from kpu.records.teachers import (
    GROUP,
    HEAD,
    STATISTICS,
    Head,
    PublishedTeacher,
    dump_group,
    dump_head,
    load_teacher,
    output_layout,
    read_teacher,
)
from kpu.shards.zarr_metadata import array_metadata
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.util.digests import digest, digest_of
from kpu.util.failpoints import failpoint

OWN_CALIBRATION: Final = "own"


def publish_teacher(
    storage: Storage,
    plan: Plan,
    spec: TeacherSpec,
    statistics: dict[str, Statistics],
    head: Head | None,
    run: str,
    *,
    calibration: str = OWN_CALIBRATION,
) -> PublishedTeacher:
    """Publish a teacher's files, its `zarr.json` last; or return the same teacher if it is published already.

    Existing statistics for the same model, step and `calibration` (where they come from) win over `statistics`: the
    caller quantises with what is returned, so two drivers agree. Files that an interrupted run left for another model
    are quarantined.

    Raises:
        MismatchError: a teacher of this name exists with different settings.
    """
    folder = paths.teacher(paths.check_name("teacher", spec.name))
    marker = paths.group(folder)
    if storage.size(marker) is not None:
        return _existing(storage, plan, spec)

    with publishing(storage, marker, run, lambda: _sealed(storage, spec.name)) as publish:
        raw = _agreed_statistics(storage, spec, statistics, calibration, run)
        encoding, files = _publish_files(plan, spec, raw, head, publish)
        won = storage.publish(marker, dump_group(spec, encoding, files), run=run)
        if won:
            failpoint("teacher.published")
    return load_teacher(storage, plan, spec.name) if won else _existing(storage, plan, spec)


def _agreed_statistics(
    storage: Storage, spec: TeacherSpec, statistics: dict[str, Statistics], calibration: str, run: str
) -> bytes:
    """The statistics file that exists for this model, step and calibration, or else one of `statistics`."""
    existing = _read_statistics(storage, spec, calibration)
    raw = existing[0] if existing else dump_statistics(statistics, _metadata(spec, calibration))
    if existing is None and not storage.publish(f"{paths.teacher(spec.name)}/{STATISTICS}", raw, run=run):
        existing = _read_statistics(storage, spec, calibration)  # another driver may have been faster
        raw = existing[0] if existing else raw
    return raw


def _publish_files(
    plan: Plan, spec: TeacherSpec, raw: bytes, head: Head | None, publish: Callable[[str, bytes], str]
) -> tuple[str, dict[str, str]]:
    """Publish everything that the teacher's `zarr.json` seals; `raw` is its statistics file.

    Returns the encoding fingerprint, and digests by name.
    """
    folder = paths.teacher(spec.name)
    files = {STATISTICS: publish(f"{folder}/{STATISTICS}", raw)}
    agreed, _ = load_statistics(raw, f"{folder}/{STATISTICS}")
    failpoint("teacher.statistics")

    if head is not None:
        files[HEAD] = publish(f"{folder}/{HEAD}", dump_head(head))
    grids = {output.name: make_grid(spec.codec, agreed[output.name]) for output in spec.outputs}
    for output in spec.outputs:
        paths.check_name("output", output.name)
        grid = grids[output.name]
        array = output_layout(plan, spec, output, grid)
        metadata = array_metadata(array, {"kpu": grid.attributes(output.grid)})
        name = f"{output.name}/{GROUP}"
        files[name] = publish(f"{folder}/{name}", metadata)
    failpoint("teacher.arrays")
    return encoding_fingerprint(grids), files


def _sealed(storage: Storage, name: str) -> dict[str, str]:
    """Digests, by key, of the files that the teacher's published `zarr.json` seals."""
    files = read_teacher(storage, name).files
    return {f"{paths.teacher(name)}/{file}": found for file, found in files.items() if file != GROUP}


def _existing(storage: Storage, plan: Plan, spec: TeacherSpec) -> PublishedTeacher:
    check_same(read_teacher(storage, spec.name).spec, spec)
    return load_teacher(storage, plan, spec.name)


def existing_statistics(
    storage: Storage, spec: TeacherSpec, *, calibration: str = OWN_CALIBRATION
) -> dict[str, Statistics] | None:
    """Statistics that an interrupted run published for this very model, step and calibration; else None."""
    found = _read_statistics(storage, spec, calibration)
    return found[1] if found else None


def _metadata(spec: TeacherSpec, calibration: str) -> dict[str, str]:
    codec = spec.codec
    step = f"{codec.step}, rotated" if codec.name == "rotated" else str(codec.step)
    return {"model": spec.model_fingerprint, "step": step, "calibration": calibration}


def _read_statistics(
    storage: Storage, spec: TeacherSpec, calibration: str
) -> tuple[bytes, dict[str, Statistics]] | None:
    file = f"{paths.teacher(spec.name)}/{STATISTICS}"
    try:
        raw = storage.read(file)
        statistics, metadata = load_statistics(raw, file)
    except (FileNotFoundError, CorruptError):
        return None
    wanted = _metadata(spec, calibration)
    if {key: metadata.get(key) for key in wanted} != wanted:
        return None
    return raw, statistics


def encoding_fingerprint(grids: dict[str, QuantGrid]) -> str:
    """Digest of the codec, centre, scale and axes of every output: equal for caches whose stored values compare."""

    def parameters(grid: QuantGrid) -> str:
        return digest(*(array.tobytes() for array in (grid.centre, grid.scale, grid.axes) if array is not None))

    return digest_of({name: [grid.codec.model_dump(mode="json"), parameters(grid)] for name, grid in grids.items()})


def check_same(published: TeacherSpec, spec: TeacherSpec) -> None:
    """Compare a teacher as published with one about to be added under its name.

    Raises:
        MismatchError: naming each field that differs.
    """
    if differences := list_differences(published, spec):
        raise MismatchError(
            f"teacher {spec.name!r} already exists with different settings: {'; '.join(differences)}. "
            "Use the same settings, or add this one under a new teacher name"
        )


def list_differences(published: TeacherSpec, spec: TeacherSpec) -> list[str]:
    """Each field in which two teachers differ, with both values. Where weights lie, and mere words, may differ."""

    def fields(value: TeacherSpec) -> dict[str, Any]:
        flat = {
            **value.model_dump(mode="json", exclude={"weights", "no_head", "pooling", "unproven"}),
            "model": value.model_part["model"],
        }
        if value.input is not None:
            flat["input"] = dict(value.input)  # with what documents leave out
        flat["outputs"] = {output.pop("name"): output for output in flat["outputs"]}
        if published.extra_digest is None:  # an earlier release did not look
            flat.pop("extra_digest", None)
        if not published.has_head:  # nor did it find the classifier of every model; the cache goes on without
            flat.pop("has_head")
        return flat

    return list(_differences(fields(published), fields(spec), ""))


def _differences(published: dict[str, Any], found: dict[str, Any], prefix: str) -> Iterator[str]:
    for key in [*published, *(key for key in found if key not in published)]:
        expected, actual = published.get(key), found.get(key)
        if isinstance(expected, dict) and isinstance(actual, dict):
            yield from _differences(expected, actual, f"{prefix}{key}.")
        elif expected != actual:
            yield f"{prefix}{key}: expected {json.dumps(expected)}, found {json.dumps(actual)}"
