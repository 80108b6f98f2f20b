"""A published teacher: its `zarr.json`, which seals its spec, arrays, statistics and head."""

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from kpu.errors import CorruptError
from kpu.format.base import Frozen
from kpu.format.codecs import QuantGrid
from kpu.format.plan import Plan
from kpu.format.statistics import Statistics, load_statistics
from kpu.format.teacher import OutputSpec, ShardFormat, TeacherSpec
from kpu.records.plan import chunk_rows, read_checked
from kpu.shards.layout import ArrayLayout
from kpu.shards.zarr_metadata import array_layout, group_metadata
from kpu.storage import paths
from kpu.storage.base import Storage
from kpu.util.digests import DIGEST_BYTES, digest, digest_of
from kpu.util.strict_json import parse_json_object

STATISTICS: Final = "stats.safetensors"
HEAD: Final = "head.safetensors"
GROUP: Final = "zarr.json"
_NO_DIGEST: Final = "." * (2 * DIGEST_BYTES)

Head = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class TeacherManifest:
    """What `teachers/<teacher>/zarr.json` says.

    `files` maps names inside the teacher's folder to digests of their raw bytes, `zarr.json` itself included.
    `model_fingerprint` covers what decides the features, `encoding_fingerprint` the grid that they are stored on.
    """

    spec: TeacherSpec
    model_fingerprint: str
    encoding_fingerprint: str
    files: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Digest of both parts: what every commit record repeats."""
        return digest_of([self.model_fingerprint, self.encoding_fingerprint])


class _Sealed(Frozen):
    """The attribute `kpu` of a teacher's `zarr.json`."""

    spec: TeacherSpec
    model_fingerprint: str
    encoding_fingerprint: str
    files: dict[str, str]
    digest: str


@dataclass(frozen=True)
class PublishedTeacher(TeacherManifest):
    """A published teacher; `head` is (weight f32[C, D], bias f32[C])."""

    statistics: dict[str, Statistics]
    grids: dict[str, QuantGrid]
    layouts: dict[str, ArrayLayout]
    head: Head | None


def output_layout(plan: Plan, spec: TeacherSpec, output: OutputSpec, grid: QuantGrid) -> ArrayLayout:
    """Layout of one output's array: in Zarr a chunk is one row of a map, 64 rows of vectors; in tars one row."""
    return shard_layout(plan.rows, plan.unit_rows, spec.name, spec.format, output, grid)


def shard_layout(
    rows: int, unit_rows: int, teacher: str, shards: ShardFormat, output: OutputSpec, grid: QuantGrid
) -> ArrayLayout:
    """As `output_layout`, from its parts."""
    tar = shards == "webdataset"
    return ArrayLayout(
        rows=rows,
        unit_rows=unit_rows,
        chunk_rows=1 if tar or len(output.shape) > 1 else chunk_rows(unit_rows),
        item_shape=output.shape,
        dtype=grid.dtype,
        fill=grid.fill,
        packing="gzip" if tar and grid.on_grid else grid.packing,
        member=f"{teacher}.{output.name}" if tar else None,
    )


def dump_head(head: Head) -> bytes:
    """`head.safetensors`: `weight` float32 [C, D], `bias` float32 [C]."""
    weight, bias = (np.ascontiguousarray(tensor, dtype=np.float32) for tensor in head)
    return save_tensors({"weight": weight, "bias": bias})


def load_head(raw: bytes, file: str) -> Head:
    """Parse what `dump_head` wrote.

    Raises:
        CorruptError: it is no such file.
    """
    try:
        tensors = load_tensors(raw)
        weight, bias = tensors["weight"], tensors["bias"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(file, f"holds no head ({error})") from None
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or {weight.dtype, bias.dtype} != {np.dtype(np.float32)}:
        found = ", ".join(f"{tensor.dtype}{list(tensor.shape)}" for tensor in (weight, bias))
        raise CorruptError(file, f"expected a weight float32[C, D] and a bias float32[C], found {found}")
    return weight, bias


def dump_group(spec: TeacherSpec, encoding: str, files: dict[str, str]) -> bytes:
    """`zarr.json` with a digest of its own bytes in which the digest's place is taken by dots."""
    attributes = {
        "spec": spec.model_dump(mode="json"),
        "model_fingerprint": spec.model_fingerprint,
        "encoding_fingerprint": encoding,
        "files": files,
        "digest": _NO_DIGEST,
    }
    raw = group_metadata({"kpu": attributes})
    if raw.count(_NO_DIGEST.encode()) != 1:
        raise ValueError("zarr.json must hold the place of its digest once")
    return raw.replace(_NO_DIGEST.encode(), digest(raw).encode())


def read_teacher(storage: Storage, name: str) -> TeacherManifest:
    """A teacher's `zarr.json` alone.

    Raises:
        CorruptError: it is missing, or any byte differs from what was published.
    """
    file = paths.group(paths.teacher(name))
    try:
        raw = storage.read(file)
    except FileNotFoundError:
        raise CorruptError(file, "is missing: the teacher is not published", teacher=name) from None
    attributes, claimed = _attributes(raw, file, name)
    blank = raw.replace(claimed, _NO_DIGEST.encode()) if claimed else raw
    if digest(blank) != claimed.decode():
        raise CorruptError(file, "does not match the digest it carries", teacher=name)
    try:
        sealed = _Sealed.model_validate(attributes)
    except ValidationError as error:
        raise CorruptError(file, f"holds no valid spec ({error})", teacher=name) from None
    if sealed.spec.name != name:
        raise CorruptError(file, f"is of teacher {sealed.spec.name!r}", teacher=name)
    names = [output.name for output in sealed.spec.outputs]
    missing = {STATISTICS, *(f"{output}/{GROUP}" for output in names)} - sealed.files.keys()
    if missing:
        reason = f"files: expected digests of {sorted(missing)} among them, found {sorted(sealed.files)}"
        raise CorruptError(file, reason, teacher=name)
    if not names or len(set(names)) < len(names):
        raise CorruptError(file, f"spec.outputs: expected names that differ, found {names}", teacher=name)
    return TeacherManifest(
        spec=sealed.spec,
        model_fingerprint=sealed.model_fingerprint,
        encoding_fingerprint=sealed.encoding_fingerprint,
        files={**sealed.files, GROUP: digest(raw)},
    )


def _attributes(raw: bytes, file: str, name: str) -> tuple[dict[str, Any], bytes]:
    """The attribute `kpu` of a teacher's `zarr.json`, and the digest in it."""
    try:
        found: Any = parse_json_object(raw)
    except ValueError as error:
        raise CorruptError(file, f"is not JSON ({error})", teacher=name) from None
    for key in ("attributes", "kpu"):
        found = found.get(key)
        if not isinstance(found, dict):
            reason = f"{key}: expected a JSON object, found {_short(found)}"
            raise CorruptError(file, f"is not a teacher's zarr.json: {reason}", teacher=name)
    if not isinstance(found.get("digest"), str):
        reason = f"digest: expected text, found {_short(found.get('digest'))}"
        raise CorruptError(file, f"is not a teacher's zarr.json: {reason}", teacher=name)
    return found, found["digest"].encode()


def _short(value: object) -> str:
    return "nothing" if value is None else repr(value)[:80]


def load_teacher(storage: Storage, plan: Plan, name: str) -> PublishedTeacher:
    """A teacher with everything that its units rely on, every digest checked.

    Raises:
        CorruptError: a file is missing or damaged, or describes arrays that do not fit the plan.
    """
    teacher = read_teacher(storage, name)
    folder = paths.teacher(name)
    raw = {
        file: read_checked(storage, f"{folder}/{file}", expected, teacher=name)
        for file, expected in teacher.files.items()
    }
    statistics, _ = load_statistics(raw[STATISTICS], f"{folder}/{STATISTICS}")
    grids, layouts = {}, {}
    for output in teacher.spec.outputs:
        file = f"{folder}/{output.name}/zarr.json"
        array, attributes = array_layout(raw[f"{output.name}/zarr.json"], file)
        grid, tokens = QuantGrid.from_attributes(attributes.get("kpu", {}), file)
        if not _same_layout(array, output_layout(plan, teacher.spec, output, grid)) or tokens != output.grid:
            raise CorruptError(file, f"does not fit the plan and the spec: found {array}", teacher=name)
        channels = output.channels
        if grid.codec != teacher.spec.codec or len(grid.centre) != channels:
            found = f"found {len(grid.centre)} of {grid.codec}"
            raise CorruptError(file, f"expected {channels} channels of {teacher.spec.codec}, {found}", teacher=name)
        if output.name not in statistics or len(statistics[output.name].mean) != channels:
            reason = f"expected statistics of {channels} channels of {output.name!r}, found others or none"
            raise CorruptError(f"{folder}/{STATISTICS}", reason, teacher=name)
        grids[output.name], layouts[output.name] = grid, array
    return PublishedTeacher(
        spec=teacher.spec,
        model_fingerprint=teacher.model_fingerprint,
        encoding_fingerprint=teacher.encoding_fingerprint,
        files=teacher.files,
        statistics=statistics,
        grids=grids,
        layouts=layouts,
        head=load_head(raw[HEAD], f"{folder}/{HEAD}") if HEAD in raw else None,
    )


def _same_layout(one: ArrayLayout, other: ArrayLayout) -> bool:
    same_fill = np.array_equal(one.fill, other.fill, equal_nan=True)
    return same_fill and replace(one, fill=0) == replace(other, fill=0)


def teacher_names(storage: Storage) -> list[str]:
    """Published teachers, sorted."""
    return [name for name in teacher_folders(storage) if storage.size(paths.group(paths.teacher(name))) is not None]


def teacher_folders(storage: Storage) -> list[str]:
    """Every teacher that a run has begun, published or not, sorted."""
    found = [name for name in storage.names("teachers") if not name.startswith(".") and name != GROUP]
    return sorted(name for name in found if any(True for _ in storage.names(paths.teacher(name))))


def output_shard(teacher: PublishedTeacher, output: OutputSpec, unit: int) -> str:
    """Key of the object that holds one unit of one output."""
    folder = f"{paths.teacher(teacher.spec.name)}/{output.name}"
    return teacher.layouts[output.name].key(folder, unit)
