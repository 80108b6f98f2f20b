"""`export` and `import`: the whole way from a cache to other formats and back, and what is refused."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kpu import open_cache
from kpu.pixels.views import resolve_view
from tests.support.builders import tree
from tests.support.theia import members
from tests.support.toys import assert_refused, kpu, kpu_json, snapshot, write_images, write_teacher
from trainer.data.corpus import Corpus
from trainer.data.images import ImageReader
from trainer.sections import StudentConfig
from trainer.students.base import BaseInfo
from trainer.students.models import build_base
from trainer.students.parallel import ParallelStudent

WANTED = {"t": ("global", "patch"), "u": ("patch",)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a cache `o.kpu` of two teachers in Zarr, and a dataset of Theia's in `root`."""
    folder = tmp_path_factory.mktemp("convert")
    images, model = write_images(folder / "images" / "cats", 70), write_teacher(folder)
    (images / "broken.png").write_bytes(b"no image")
    teachers = ["-t", f"t={model}:toy", "-t", f"u={model}:wider"]
    assert kpu("extract", images.parent, *teachers, "-o", folder / "o.kpu").exit_code == 0
    assert kpu("export", folder / "o.kpu", folder / "root", "--format", "theia").exit_code == 0
    return folder


@pytest.fixture(scope="module")
def imported(place: Path) -> Path:
    options = ["--dataset", "o", "--split", "train", "--codec", "fp32"]
    assert kpu("import", place / "root", place / "imported.kpu", *options).exit_code == 0
    return place / "imported.kpu"


def test_to_tars_and_back(place: Path, tmp_path: Path) -> None:
    result = kpu("export", place / "o.kpu", tmp_path / "tars.kpu")
    assert result.exit_code == 0
    assert "exported: 4 units of t, u" in result.stdout
    done = kpu_json("export", tmp_path / "tars.kpu", tmp_path / "zarr.kpu", "--format", "zarr")
    assert (done["converted"], done["existing"], done["teachers"]) == (4, 0, ["t", "u"])
    kept = {file: raw for file, raw in tree(place / "o.kpu").items() if not file.startswith("runs/")}
    assert tree(tmp_path / "zarr.kpu") == kept
    again = kpu("export", place / "o.kpu", tmp_path / "tars.kpu")
    assert "exported: 0 units of t, u, 4 existed already" in again.stdout
    assert kpu("verify", "--deep", tmp_path / "tars.kpu").exit_code == 0


def test_training_reads_the_same_batches(place: Path, tmp_path: Path) -> None:
    assert kpu("export", place / "o.kpu", tmp_path / "tars.kpu").exit_code == 0
    zarr, tars = (Corpus([str(path)], WANTED, "t") for path in (place / "o.kpu", tmp_path / "tars.kpu"))
    assert tars.digest == zarr.digest
    for rows in (np.arange(71), np.random.default_rng(0).integers(0, 71, 40)):
        one, other = zarr.fetch(rows), tars.fetch(rows)
        assert one.stored.keys() == other.stored.keys()
        assert all(torch.equal(values, other.stored[key]) for key, values in one.stored.items())
        assert all(torch.equal(values, other.weights[key]) for key, values in one.weights.items())
    ours, theirs = zarr.standardisers(), tars.standardisers()
    assert all(torch.equal(step.factor, theirs[key].factor) for key, step in ours.items())
    assert all(torch.equal(step.offset, theirs[key].offset) for key, step in ours.items())


def test_dequantised(place: Path, tmp_path: Path) -> None:
    assert kpu("export", place / "o.kpu", tmp_path / "f.kpu", "--dequantise", "-t", "u").exit_code == 0
    source, out = open_cache(place / "o.kpu"), open_cache(tmp_path / "f.kpu")
    assert list(out.teachers) == ["u"]
    np.testing.assert_array_equal(out.read("u", "patch", range(70)), source.read("u", "patch", range(70)))


def test_a_view_is_what_theia_gets(place: Path, tmp_path: Path) -> None:
    teacher = f"t=torch:{place}/toy.py:toy"
    out = tmp_path / "v.kpu"
    assert kpu("extract", place / "images", "-t", teacher, "-o", out, "--set", "views=2").exit_code == 0
    moved = shutil.copytree(place / "images", tmp_path / "moved")
    result = kpu(
        "export", out, tmp_path, "--format", "theia", "--images", moved, "--dataset", "views", "--split", "val"
    )
    assert result.exit_code == 0
    assert "140 samples of t, 2 masked rows left out" in result.stdout
    cache = open_cache(out)
    found = dict(members(tmp_path / "views/images"))
    for record, row in zip(cache.samples.to_table().to_pylist()[:20], range(20), strict=True):
        with Image.open(place / "images" / record["file"]) as image:
            view = resolve_view(record["draws"], *image.size, cache.plan.crop)
            expected = image.crop(view.box)
        if view.flip:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        np.testing.assert_array_equal(np.load(io.BytesIO(found[f"{row:012d}.image"])), np.asarray(expected))


def test_import_what_was_exported(place: Path, imported: Path) -> None:
    assert json.loads((place / "root/o/splits.json").read_text()) == {"train": 70}
    source, cache = open_cache(place / "o.kpu"), open_cache(imported)
    for name, outputs in WANTED.items():
        for output in outputs:
            expected = torch.from_numpy(source.read(name, output, range(70))).bfloat16().float().numpy()
            np.testing.assert_array_equal(cache.read(name, output, slice(None)), expected)
    assert kpu("verify", imported).exit_code == 0
    assert kpu("status", imported).exit_code == 0
    assert "input    not known: features were imported" in kpu("info", imported).stdout


def test_a_student_on_images_finds_those_of_an_import(place: Path, imported: Path) -> None:
    source, cache = open_cache(place / "o.kpu"), open_cache(imported)
    size = source.teachers["t"].spec.known_input
    ours, valid = ImageReader(cache, size, root=None, threads=1).load(np.arange(70))
    theirs, _ = ImageReader(source, size, root=None, threads=1).load(np.arange(70))
    assert valid.all()
    np.testing.assert_array_equal(ours, theirs)


def test_a_teacher_is_added_to_an_import(place: Path, imported: Path, tmp_path: Path) -> None:
    out = shutil.copytree(imported, tmp_path / "i.kpu")
    tars = place / "root/o/images/*-train.tar"
    teacher = f"new=torch:{place}/toy.py:toy"
    result = kpu("extract", tars, "-t", teacher, "-o", out, "--set", "data.image=image")
    assert result.exit_code == 0, result.stderr
    cache, source = open_cache(out), open_cache(place / "o.kpu")
    error = np.abs(cache.read("new", "patch", range(70)) - source.read("t", "patch", range(70)))
    assert (error <= 1.01 * source.teachers["t"].grid("patch").scale).all()


def test_an_imported_teacher_cannot_be_run(imported: Path) -> None:
    assert_refused(kpu("verify", "--deep", imported), "'t' (theia:t)", "imported", "cannot be run again")
    corpus = Corpus([str(imported)], {"t": ("patch",)}, "t")
    source = corpus.sources["t"]
    with pytest.raises(Exception, match="cannot be run again"):
        build_base(source.spec, ("patch",), 0)
    info = BaseInfo(source.spec, source.shapes, source.statistics, source.seed)
    with pytest.raises(Exception, match="cannot be run again"):
        ParallelStudent(StudentConfig(kind="parallel"), info, ("patch",))


def test_what_export_refuses(place: Path, imported: Path, tmp_path: Path) -> None:
    cache, out = place / "o.kpu", tmp_path / "out"
    assert_refused(kpu("export", cache, out, "--format", "tfrecord"), "format: expected zarr, webdataset or theia")
    assert_refused(kpu("export", cache, out, "--split", "val"), "split: format webdataset has no use for it")
    assert_refused(kpu("export", cache, out, "--format", "theia", "--dequantise"), "dequantise: format theia")
    assert_refused(kpu("export", cache, out, "-t", "omega"), "'omega'", "['t', 'u']")
    assert_refused(kpu("export", cache, cache), "another place")
    assert_refused(kpu("export", cache, place / "images"), "found a folder with 'cats'")
    assert_refused(kpu("export", cache, imported), "another plan")
    before = snapshot(place / "root")
    assert_refused(kpu("export", cache, place / "root", "--format", "theia"), "has 'train' already, whole")
    assert snapshot(place / "root") == before
    described = " ".join(kpu("export", "--help").stdout.split())
    assert "theia gives a split of a dataset for Theia; if interrupted it starts again" in described
    incomplete = shutil.copytree(cache, tmp_path / "incomplete.kpu")
    (incomplete / "teachers/u/commits/000001.json").unlink()
    assert_refused(kpu("export", incomplete, out), "'u': expected all 2 units, found 1 not committed (unit 1)")
    assert not out.exists()


def test_what_import_refuses(place: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out.kpu", ["--dataset", "o", "--split", "train"]
    assert_refused(kpu("import", place / "root", out, *options, "--codec", "int4"), "codec: expected one of uniform")
    assert_refused(kpu("import", place / "root", out, *options, "--format", "theia"), "format: expected zarr or")
    assert_refused(kpu("import", place / "root", out, "--dataset", "o", "--split", "val"), "*-val.tar")
    assert_refused(kpu("import", place / "root", place / "o.kpu", *options))
    assert not out.exists()
