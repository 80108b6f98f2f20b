"""A small cache whose images exist, and the dataset of Theia's that it gives."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from kpu.commit.writer import CacheWriter
from kpu.format.teacher import OutputSpec
from kpu.records.images import UnitImages
from kpu.records.samples import Samples
from kpu.storage.leases import lease
from kpu.storage.open import open_storage
from kpu.util.digests import digest_bytes
from tests.support.builders import (
    MASKED_ROW,
    ROWS,
    UNIT_ROWS,
    encode_unit,
    image_status,
    key_of,
    make_plan,
    make_teacher,
    teacher_spec,
)

PLAIN = (OutputSpec(name="patch", shape=(6, 5), grid=(2, 3)),)
"""The outputs of teacher `gamma`, which has no vector; `alpha` has both."""


def pixels_of(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (4 + row % 3, 7, 3), dtype=np.uint8)


def write_images(root: Path) -> None:
    for row in range(ROWS):
        file = root / key_of(row)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_of(row)).save(file)
    (root / key_of(MASKED_ROW)).write_bytes(b"\x89PNG\r\n\x1a\n")


def build_pictured(path: Path, images: Path, *, root: str = "/images") -> None:
    """As `builders.build`, with teachers `alpha` and `gamma` and images in the folder `images`.

    `root` is where the plan says that they are.
    """
    write_images(images)
    storage = open_storage(path, create=True)
    with lease(storage, "run"):
        plan = make_plan(storage, "run", root=root)
        specs = [teacher_spec("alpha"), teacher_spec("gamma", outputs=PLAIN)]
        teachers = [make_teacher(storage, plan, spec, "run") for spec in specs]
        writer = CacheWriter(storage, plan, "run")
        for unit in range(plan.units):
            rows = slice(unit * UNIT_ROWS, min((unit + 1) * UNIT_ROWS, ROWS))
            raw = [digest_bytes((images / key_of(row)).read_bytes()) for row in range(rows.start, rows.stop)]
            found = UnitImages(
                np.frombuffer(b"".join(raw), np.uint8).reshape(-1, 16),
                image_status()[rows],
                np.ones((len(raw), 2), np.int32),
            )
            transaction = writer.unit(unit, Samples(storage, plan).unit(unit))
            transaction.images(found)
            for teacher in teachers:
                transaction.teacher(teacher, encode_unit(teacher, unit))


def members(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of all members of the tars in a folder, in order."""
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as opened:
            for member in opened:
                file = opened.extractfile(member)
                assert file is not None
                yield member.name, file.read()


def rewrite(tar: Path, content: list[tuple[str, bytes]]) -> None:
    """Write a tar anew, through Python's own library."""
    with tarfile.open(tar, "w") as opened:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
