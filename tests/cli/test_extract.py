"""`extract` where something stands already: it goes on, adds, or refuses and leaves everything as it was."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import Result

from kpu import open_cache
from kpu.commit.teacher import publish_teacher
from kpu.records.plan import sample_digests
from kpu.storage.leases import lease
from kpu.storage.open import open_storage
from tests.support.toys import assert_refused, files, kpu, kpu_json, noise, snapshot, write_images, write_teacher

ROWS = 70  # two units of 64 rows


class Made(NamedTuple):
    """A finished cache of teacher `t` (a fresh copy), and what it was made from."""

    out: Path
    images: Path
    model: str
    weights: Path

    @property
    def arguments(self) -> list[object]:
        """What was given to make it."""
        weights = f"teachers.t.weights={self.weights}"
        return [self.images, "-t", f"t={self.model}:toy", "-o", self.out, "--set", weights]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    place = tmp_path_factory.mktemp("made")
    images, model = write_images(place / "images", ROWS), write_teacher(place)
    made = Made(place / "o.kpu", images, model, write_weights(place / "weights.safetensors", 1.0))
    assert kpu("extract", *made.arguments).exit_code == 0
    return made


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    shutil.copytree(original.images, tmp_path / "images")
    shutil.copytree(original.out, tmp_path / "o.kpu")
    return original._replace(out=tmp_path / "o.kpu", images=tmp_path / "images")


def write_weights(path: Path, factor: float) -> Path:
    module = nn.Conv2d(3, 6, 4, 4)
    tensors = {f"convolution.{name}": value * 0 + factor for name, value in module.state_dict().items()}
    head = {f"head.{name}": value * 0 for name, value in nn.Linear(6, 3).state_dict().items()}
    save_file({**tensors, **head}, path)
    return path


# --- other data ---


def fewer(made: Made) -> list[object]:
    (made.images / "030.png").unlink()
    return []


def renamed(made: Made) -> list[object]:
    (made.images / "068.png").rename(made.images / "069a.png")
    return []


def more(made: Made) -> list[object]:
    noise(0).save(made.images / "999.png")
    return []


def as_table(made: Made) -> list[object]:
    path = made.images.parent / "images.parquet"
    pq.write_table(pa.table({"image": [b"x"] * ROWS}), path)
    return ["--set", f"data.source={path}"]


def classes(made: Made) -> list[object]:
    (made.images / "cats").mkdir()
    for path in made.images.glob("*.png"):
        path.rename(made.images / "cats" / path.name)
    return []


def settings(*assignments: str) -> Callable[[Made], list[object]]:
    return lambda _: [argument for assignment in assignments for argument in ("--set", assignment)]


def other_weights(made: Made) -> list[object]:
    return ["--set", f"teachers.t.weights={write_weights(made.out.parent / 'other.safetensors', 2.0)}"]


def other_calibration(made: Made) -> list[object]:
    other = made._replace(out=made.out.parent / "other.kpu")
    assert kpu("extract", *other.arguments, "--set", "data.limit=9").exit_code == 0
    return ["--set", f"calibration_from={other.out}"]


OTHER: dict[str, tuple[Callable[[Made], list[object]], tuple[str, ...]]] = {
    "fewer": (fewer, ("data.source", "expected 70 rows, found 69", "row 30: expected '030.png', found '031.png'")),
    "more": (more, ("data.source", "expected 70 rows, found 71", "row 70: expected no image, found '999.png'")),
    "limit": (settings("data.limit=64"), ("expected 70 rows, found 64", "row 64: expected '064.png', found no image")),
    "renamed": (renamed, ("data.source", "row 68: expected '068.png', found '069.png'", "another `out`")),
    "classes": (classes, ("data.source", "row 0: expected '000.png', found 'cats/000.png'")),
    "kind": (as_table, ("data.source", "made with a folder source, found a parquet source")),
    "seed": (settings("seed=1"), ("seed: ", "made with 0, found 1")),
    "views": (settings("views=2"), ("views: ", "made with 1, found 2")),
    "unit rows": (settings("unit_rows=128"), ("unit_rows: ", "made with 64, found 128")),
    "weights": (other_weights, ("teacher 't'", "weights_digest: expected", "found", "new teacher name")),
    "input": (settings("teachers.t.input.size=16"), ("input.size: expected [8, 8], found [16, 16]",)),
    "codec": (settings("codec.step=0.1"), ("codec.step: expected 0.05, found 0.1",)),
    "precision": (settings("teachers.t.precision=bf16"), ('precision: expected "fp32", found "bf16"',)),
    "output": (settings("teachers.t.outputs=[global]"), ("outputs.patch: expected", "new teacher name")),
    "calibration": (other_calibration, ("calibration_from", "'t'", "another calibration", "new teacher name")),
}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("mode", [(), ("--dry-run",)], ids=["extract", "dry-run"])
def test_a_cache_made_otherwise_is_refused_and_left_alone(name: str, mode: tuple[str, ...], made: Made) -> None:
    change, fragments = OTHER[name]
    arguments = change(made)
    before = snapshot(made.out)
    assert_refused(kpu("extract", *made.arguments, *arguments, *mode), *fragments)
    assert snapshot(made.out) == before
    assert kpu("status", made.out).exit_code == 0


def test_an_output_cannot_be_added_to_a_teacher(made: Made) -> None:
    place = made._replace(out=made.out.parent / "global.kpu")
    assert kpu("extract", *place.arguments, "--set", "teachers.t.outputs=[global]").exit_code == 0
    before = snapshot(place.out)
    assert_refused(kpu("extract", *place.arguments), "outputs.patch: expected null", "add this one under a new teacher")
    assert snapshot(place.out) == before


# --- the same, and more ---


def test_the_same_command_again_does_nothing(made: Made) -> None:
    before = files(made.out, ["images", "plan", "samples", "teachers", "zarr"])
    result = kpu("extract", *made.arguments)
    assert result.exit_code == 0
    assert "nothing is left to do" in result.stdout
    assert files(made.out, ["images", "plan", "samples", "teachers", "zarr"]) == before


def test_images_that_moved_as_a_whole_are_the_same(made: Made) -> None:
    (made.out / "teachers/t/commits/000001.json").unlink()
    elsewhere = made.images.rename(made.images.with_name("elsewhere"))
    assert kpu("extract", *made._replace(images=elsewhere).arguments).exit_code == 0
    noise(999).save(elsewhere / "065.png")  # it is from there that verification reads the images
    report = kpu_json("verify", "--deep", "--rows", ROWS, made.out)
    assert {entry["file"] for entry in report["problems"]} >= {"images/digest/c/1/0"}


def test_a_second_teacher_touches_no_file_of_the_first(made: Made) -> None:
    parts = ["images", "plan", "samples", "teachers/t/", "teachers/zarr", "zarr"]
    before = files(made.out, parts)
    result = kpu("extract", made.images, "-t", f"u={made.model}:wider", "-o", made.out)
    assert result.exit_code == 0, result.output
    assert files(made.out, parts) == before
    assert list(kpu_json("status", made.out)["teachers"]) == ["t", "u"]


def test_an_image_that_changed_before_a_later_teacher_is_named(made: Made) -> None:
    image = made.images / "065.png"
    content = image.read_bytes()
    noise(999).save(image)
    result = kpu("extract", made.images, "-t", f"u={made.model}:wider", "-o", made.out)
    assert result.exit_code == 1
    assert "image '065.png' (row 65): its bytes changed since it was extracted" in result.stderr
    assert "retry-failed" in result.stdout
    status = kpu_json("status", made.out)
    assert not status["complete"]
    assert [(entry["teacher"], entry["unit"]) for entry in status["failed"]] == [(None, 1)]
    assert status["teachers"]["u"]["committed_units"] == 1

    image.write_bytes(content)
    retried = kpu("retry-failed", made.out, "--json")
    assert retried.exit_code == 0, retried.output
    assert json.loads(retried.stdout)["retried_units"] == 1
    assert kpu("status", made.out).exit_code == 0


def test_an_image_that_changed_is_found_by_deep_verification(made: Made) -> None:
    out = made.out.parent / "new.kpu"
    assert kpu("extract", *made._replace(out=out).arguments).exit_code == 0
    noise(999).save(made.images / "065.png")
    assert kpu_json("verify", out)["ok"]
    result = kpu("verify", "--deep", "--rows", ROWS, out)
    assert result.exit_code == 1
    assert "images/digest/c/1/0 (unit 1): the image of '065.png' is not the one that was extracted" in result.stdout
    assert "stored patch is more than one grid step from the teacher's" in result.stdout


def test_calibration_of_another_cache(made: Made) -> None:
    test_set = made._replace(out=made.out.parent / "test.kpu", images=write_images(made.out.parent / "test", 5))
    result = kpu("extract", *test_set.arguments, "--set", f"calibration_from={made.out}")
    assert result.exit_code == 0, result.output
    ours, theirs = (open_cache(path).teachers["t"] for path in (test_set.out, made.out))
    np.testing.assert_array_equal(ours.grid("patch").scale, theirs.grid("patch").scale)
    np.testing.assert_array_equal(ours.statistics["global"].covariance, theirs.statistics["global"].covariance)


def test_calibration_where_nothing_is_quantised(made: Made) -> None:
    place = made.out.parent

    def extract(name: str, lender: str | None, *, limit: int = 5) -> Result:
        settings = [
            "codec.name=fp16",
            f"data.limit={limit}",
            *([f"calibration_from={place / lender}"] if lender else []),
        ]
        chosen = [argument for each in settings for argument in ("--set", each)]
        return kpu("extract", *made._replace(out=place / name).arguments, *chosen)

    def covariance(name: str) -> np.ndarray:
        return open_cache(place / name).teachers["t"].statistics["patch"].covariance

    for name, lender, limit in (("nine", None, 9), ("eight", None, 8), ("test", "nine", 5), ("third", "test", 4)):
        assert extract(name, lender, limit=limit).exit_code == 0
    before = snapshot(place / "test")
    assert_refused(extract("test", "eight"), "calibration_from", "'t'", "another calibration")
    assert snapshot(place / "test") == before
    for lender in ("nine", "third", None):
        assert extract("test", lender).exit_code == 0

    (place / "test/teachers/t/zarr.json").unlink()  # as if it had been interrupted before its teacher stood
    shutil.rmtree(place / "test/teachers/t/commits")
    assert extract("test", "eight").exit_code == 0
    np.testing.assert_array_equal(covariance("test"), covariance("eight"))
    assert not np.array_equal(covariance("test"), covariance("nine"))


def test_a_cache_whose_statistics_name_the_grid_that_they_were_taken_from(made: Made, tmp_path: Path) -> None:
    """Earlier releases wrote the lender's encoding fingerprint as the origin of a calibration."""
    lender = open_cache(made.out)
    published = lender.teachers["t"].published
    out = open_storage(tmp_path / "test.kpu", create=True)
    with lease(out, "run"):
        for key in (
            "zarr.json",
            "teachers/zarr.json",
            "plan.json",
            *lender.plan.metadata,
            *sample_digests(lender.plan),
        ):
            out.publish(key, (made.out / key).read_bytes(), run="run")
        origin = published.encoding_fingerprint
        head, statistics = published.head, published.statistics
        publish_teacher(out, lender.plan, published.spec, statistics, head, "run", calibration=origin)
    test_set = made._replace(out=tmp_path / "test.kpu")
    assert kpu("extract", *test_set.arguments, "--set", f"calibration_from={made.out}").exit_code == 0
    assert kpu_json("verify", test_set.out)["ok"]


def test_calibration_of_a_teacher_that_is_another(made: Made) -> None:
    place = made.out.parent / "new" / "o.kpu"
    arguments = [made.images, "-o", place, "--set", f"calibration_from={made.out}"]
    assert_refused(kpu("extract", *arguments, "-t", f"t={made.model}:wider"), "calibration_from", "'t'", "o.kpu")
    assert_refused(kpu("extract", *arguments, "-t", f"u={made.model}:toy"), "calibration_from", "'u'", "found t")
    assert not place.parent.exists()


# --- a teacher that is not finite ---


@pytest.fixture
def red(tmp_path: Path) -> Path:
    """66 images, of which `064.png` is one that the poisoned teacher gives NaN for."""
    folder = write_images(tmp_path / "red", 66)
    Image.new("RGB", (12, 10), (255, 0, 0)).save(folder / "064.png")
    return folder


def test_nan_fails_its_unit_alone_and_names_the_image(red: Path, original: Made, tmp_path: Path) -> None:
    out = tmp_path / "nan.kpu"
    arguments = [red, "-t", f"t={original.model}:poisoned", "-t", f"u={original.model}:toy", "-o", out]
    result = kpu("extract", *arguments)
    assert result.exit_code == 1
    assert "warning: unit 1, teacher t, failed: teacher 't' emits NaN or infinity for '064.png'" in result.stderr
    assert f"kpu-cache retry-failed {out}" in result.stdout
    status = kpu_json("status", out)
    assert [teacher["committed_units"] for teacher in status["teachers"].values()] == [1, 2]
    assert [(entry["teacher"], entry["unit"]) for entry in status["failed"]] == [("t", 1)]
    assert "'064.png'" in status["failed"][0]["reason"]
    assert kpu("retry-failed", out).exit_code == 1

    allowed = kpu("extract", *arguments, "--set", "allow_nonfinite=true")
    assert allowed.exit_code == 0, allowed.output
    line = f"1 row masked (1 with NaN or infinity from teacher t): `kpu-cache status {out}` lists them"
    assert line in allowed.stdout
    status = kpu_json("status", out)
    assert status["complete"] and not status["failed"]
    assert status["masked"] == [{"key": "064.png", "row": 64, "reason": "NaN or infinity from teacher t"}]
    cache = open_cache(out)
    assert np.flatnonzero(~cache.valid(teacher="t")).tolist() == [64]
    assert cache.valid(teacher="u").all()


# --- places ---


def test_a_folder_of_something_else_is_refused_untouched(made: Made) -> None:
    before = snapshot(made.images)
    arguments = [made.images, "-t", f"t={made.model}:toy", "-o"]
    assert_refused(kpu("extract", *arguments, made.images), "out: ", "expected a new path", "'000.png'")
    assert_refused(kpu("extract", *arguments, made.images / "000.png"), "out: ", "found a file")
    assert_refused(kpu("extract", *arguments, made.images / "000.png" / "o.kpu"), "out: ", "000.png is not a folder")
    assert snapshot(made.images) == before


def test_a_zarr_store_of_somebody_else_is_refused_untouched(made: Made, tmp_path: Path) -> None:
    store = tmp_path / "theirs.zarr"
    store.mkdir()
    (store / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    assert_refused(kpu("extract", *made._replace(out=store).arguments), "out: ", "'zarr.json'")
    assert [path.name for path in store.iterdir()] == ["zarr.json"]


def test_a_link_that_leads_nowhere_is_refused(made: Made, tmp_path: Path) -> None:
    link = tmp_path / "link.kpu"
    link.symlink_to(tmp_path / "gone")
    assert_refused(kpu("extract", *made._replace(out=link).arguments), "out: ", "gone, which leads nowhere")


def test_an_empty_folder_is_used_and_kept_when_the_start_fails(made: Made, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    shard = tmp_path / "empty.tar"
    shard.write_bytes(b"")
    assert_refused(kpu("extract", shard, "-t", f"t={made.model}:toy", "-o", empty), "empty.tar: is not a tar")
    assert list(empty.iterdir()) == []
    assert kpu("extract", *made._replace(out=empty).arguments).exit_code == 0


def test_a_cache_whose_plan_is_damaged_is_not_taken_for_a_new_one(made: Made) -> None:
    plan = made.out / "plan.json"
    plan.write_bytes(plan.read_bytes().replace(b'"seed":', b'"sead":'))
    before = snapshot(made.out)
    assert_refused(kpu("extract", *made.arguments), "plan.json", code=1)
    assert snapshot(made.out) == before


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that this user may not write to, root included."""
    folder = tmp_path / "locked"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
        pytest.skip("root may write everywhere here, and nothing can forbid it")
    yield folder
    subprocess.run(["chattr", "-i", folder], check=True)


@pytest.mark.parametrize("mode", [(), ("--dry-run",)], ids=["extract", "dry-run"])
def test_no_permission_to_write(locked: Path, made: Made, mode: tuple[str, ...]) -> None:
    for out in (locked, locked / "o.kpu", locked / "deep" / "o.kpu"):
        result = kpu("extract", *made._replace(out=out).arguments, *mode)
        assert_refused(result, f"out: {out}", f"no permission to write in {locked}")
    assert list(locked.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_read_only_file_system(made: Made, tmp_path: Path) -> None:
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", mounted], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount")
    try:
        result = kpu("extract", *made._replace(out=mounted / "o.kpu").arguments)
        assert_refused(result, f"out: {mounted / 'o.kpu'}", "no permission to write")
    finally:
        subprocess.run(["umount", mounted], check=True)
