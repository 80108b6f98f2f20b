"""Files among those of a cache that are not its own."""

from collections.abc import Collection, Iterator, Mapping

from kpu.format.plan import Plan
from kpu.records.teachers import GROUP, TeacherManifest
from kpu.shards.layout import ArrayLayout
from kpu.storage import paths
from kpu.storage.base import Storage


def foreign_files(storage: Storage, plan: Plan, teachers: Mapping[str, TeacherManifest | None]) -> Iterator[str]:
    """Names below `samples`, `images` and `teachers` that do not belong there; folders inside shards' keys aside.

    A teacher that is None is not looked into: nothing says which files it should have.
    """
    parts = {paths.samples_part(part).rpartition("/")[2] for part in range(len(plan.samples_digests))}
    yield from _others(storage, "samples", parts)
    yield from _others(storage, paths.IMAGES, {GROUP, "commits", *paths.IMAGE_ARRAYS})
    yield from _foreign_units(storage, plan, paths.IMAGES, paths.IMAGE_ARRAYS)
    yield from _others(storage, "teachers", {GROUP, *teachers})
    for name, teacher in teachers.items():
        if teacher is None:
            continue
        folder = paths.teacher(name)
        outputs = [output.name for output in teacher.spec.outputs]
        files = {file for file in teacher.files if "/" not in file}
        yield from _others(storage, folder, {*files, "commits", *outputs})
        yield from _foreign_units(storage, plan, folder, outputs, tars=teacher.spec.format == "webdataset")


def foreign_beside_shard(storage: Storage, array: str, unit: int, shape: ArrayLayout) -> Iterator[str]:
    """Names in the folders that a shard's key makes, other than those on the way to the shard; a tar's makes none."""
    if shape.member is not None:
        return
    folder = f"{array}/c/{unit}"
    for _ in shape.item_shape:
        yield from _others(storage, folder, {"0"})
        folder += "/0"


def _others(storage: Storage, folder: str, known: Collection[str]) -> Iterator[str]:
    for name in storage.names(folder):
        if name not in known:
            yield f"{folder}/{name}"


def _foreign_units(
    storage: Storage, plan: Plan, folder: str, arrays: Collection[str], *, tars: bool = False
) -> Iterator[str]:
    for name in storage.names(f"{folder}/commits"):
        number = name.removesuffix(".json")
        if not _is_unit(number, plan) or paths.commit(folder, int(number)) != f"{folder}/commits/{name}":
            yield f"{folder}/commits/{name}"
    for array in arrays:
        if tars:
            yield from _foreign_tars(storage, plan, f"{folder}/{array}")
            continue
        yield from _others(storage, f"{folder}/{array}", {GROUP, "c"})
        for name in storage.names(f"{folder}/{array}/c"):
            if not _is_unit(name, plan) or name != str(int(name)):
                yield f"{folder}/{array}/c/{name}"


def _foreign_tars(storage: Storage, plan: Plan, folder: str) -> Iterator[str]:
    for name in storage.names(folder):
        number = name.removesuffix(".tar")
        if name != GROUP and (not _is_unit(number, plan) or paths.tar(folder, int(number)) != f"{folder}/{name}"):
            yield f"{folder}/{name}"


def _is_unit(digits: str, plan: Plan) -> bool:
    return digits.isascii() and digits.isdigit() and int(digits) < plan.units
