import json
from pathlib import Path

import numpy as np
import pytest

from kpu.commit.teacher import check_same, existing_statistics, list_differences, publish_teacher
from kpu.errors import ConfigError, CorruptError, MismatchError
from kpu.format.teacher import CodecSpec, OutputSpec
from kpu.records.plan import load_plan
from kpu.records.teachers import load_teacher, read_teacher, teacher_folders, teacher_names
from kpu.storage.base import Storage
from kpu.storage.leases import lease
from kpu.storage.open import open_storage
from tests.support.builders import (
    Hooked,
    SmallCache,
    head_of,
    make_plan,
    make_teacher,
    statistics_of,
    teacher_spec,
    tree,
)


@pytest.fixture
def empty(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "a.kpu", create=True)
    with lease(storage, "plan"):
        make_plan(storage, "plan")
    return storage


def same_statistics(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n].covariance, other[n].covariance) for n in one)


@pytest.mark.parametrize("codec", ["uniform", "rotated", "fp32", "fp16", "bf16"])
def test_a_teacher_comes_back_as_it_was_published(cache_of, codec: str) -> None:
    small = cache_of(codec)
    for name, published in small.teachers.items():
        loaded = load_teacher(small.storage, small.plan, name)
        spec = teacher_spec(name, codec)
        assert loaded.spec == spec
        assert loaded.fingerprint == published.fingerprint
        assert same_statistics(loaded.statistics, statistics_of(spec))
        assert loaded.grids.keys() == loaded.layouts.keys() == {output.name for output in spec.outputs}
        assert loaded.layouts["global"].chunk_rows == 8
        head = head_of(spec)
        assert (loaded.head is None) == (head is None)
        if head is not None:
            assert all(np.array_equal(ours, theirs) for ours, theirs in zip(loaded.head, head, strict=True))
    assert teacher_names(small.storage) == ["alpha", "beta"]


def test_publishing_again_changes_nothing_and_keeps_the_first_calibration(small_cache: SmallCache) -> None:
    before = tree(small_cache.path)
    spec = teacher_spec("alpha")
    with lease(small_cache.storage, "again"):
        again = publish_teacher(small_cache.storage, small_cache.plan, spec, {}, None, "again")
    assert again.fingerprint == small_cache.teachers["alpha"].fingerprint
    assert tree(small_cache.path) == before


def test_a_second_driver_uses_the_statistics_that_stand(empty: Storage) -> None:
    plan, spec = load_plan(empty), teacher_spec("beta")
    first = statistics_of(spec)
    other = statistics_of(teacher_spec("alpha", outputs=spec.outputs))
    assert existing_statistics(empty, spec) is None
    with lease(empty, "one"):
        publish_teacher(empty, plan, spec, first, None, "one")
    (Path(empty.url) / "teachers/beta/zarr.json").unlink()  # as if driver one had died just before
    assert same_statistics(existing_statistics(empty, spec), first)
    other["global"].covariance[0, 0] *= 2
    with lease(empty, "two"):
        published = publish_teacher(empty, plan, spec, other, None, "two")
    assert same_statistics(published.statistics, first)


@pytest.mark.parametrize(
    "changes",
    [{"weights_digest": "ab" * 16}, {"codec": CodecSpec(step=0.1)}, {"calibration": "borrowed"}],
    ids=["weights", "step", "calibration"],
)
def test_what_an_interrupted_run_left_for_another_model_is_replaced(
    empty: Storage, tmp_path: Path, changes: dict
) -> None:
    plan = load_plan(empty)
    calibration = {"calibration": changes.pop("calibration")} if "calibration" in changes else {}
    old, new = teacher_spec("alpha"), teacher_spec("alpha", **changes)
    clean = open_storage(tmp_path / "clean.kpu", create=True)
    with lease(clean, "run"):
        make_plan(clean, "run")
        publish_teacher(clean, plan, new, statistics_of(new), head_of(new), "run", **calibration)
    with lease(empty, "one"):
        make_teacher(empty, plan, old, "one")
    (Path(empty.url) / "teachers/alpha/zarr.json").unlink()
    assert existing_statistics(empty, new, **calibration) is None
    with lease(empty, "two"):
        publish_teacher(empty, plan, new, statistics_of(new), head_of(new), "two", **calibration)
    assert tree(Path(empty.url)) == tree(tmp_path / "clean.kpu")
    assert (Path(empty.url) / ".tmp/quarantine/two/teachers/alpha/stats.safetensors").exists()


def coarse_teacher(storage: Storage, run: str) -> None:
    spec = teacher_spec("alpha", CodecSpec(step=0.1))
    with lease(open_storage(storage.url), run):
        make_teacher(storage, load_plan(storage), spec, run)


def test_a_teacher_that_comes_between_the_files_of_another_driver_stands(empty: Storage) -> None:
    """The other one has another codec, moved the files aside, and fails before it could publish its own teacher."""
    plan, spec = load_plan(empty), teacher_spec("alpha")
    other = Hooked(empty, "publish", "teachers/alpha/zarr.json", lambda: 1 // 0)

    def between() -> None:
        with pytest.raises(ZeroDivisionError):
            coarse_teacher(other, "other")

    with lease(empty, "run"):
        published = make_teacher(Hooked(empty, "publish", "teachers/alpha/zarr.json", between), plan, spec, "run")
    assert published.spec.codec.step == 0.05
    assert load_teacher(empty, plan, "alpha").files == published.files


@pytest.mark.parametrize("file", ["stats.safetensors", "patch/zarr.json"])
def test_a_driver_puts_back_what_it_moved_when_the_teacher_came(empty: Storage, file: str) -> None:
    plan, spec = load_plan(empty), teacher_spec("alpha")
    with lease(empty, "dead"), pytest.raises(ZeroDivisionError):
        make_teacher(Hooked(empty, "publish", "teachers/alpha/zarr.json", lambda: 1 // 0), plan, spec, "dead")

    def first() -> None:
        with lease(empty, "first"):
            make_teacher(empty, plan, spec, "first")

    with pytest.raises(MismatchError, match="conflicts with"):
        coarse_teacher(Hooked(empty, "quarantine", f"teachers/alpha/{file}", first), "second")
    assert load_teacher(empty, plan, "alpha").spec == spec


def test_a_sealed_file_that_is_nowhere_is_named(empty: Storage) -> None:
    plan, spec = load_plan(empty), teacher_spec("alpha")

    def between() -> None:
        with pytest.raises(ZeroDivisionError):
            coarse_teacher(Hooked(empty, "publish", "teachers/alpha/zarr.json", lambda: 1 // 0), "other")
        (Path(empty.url) / ".tmp/quarantine/other/teachers/alpha/patch/zarr.json").unlink()

    with lease(empty, "run"), pytest.raises(CorruptError, match=r"^teachers/alpha/patch/zarr\.json: .*in quarantine"):
        make_teacher(Hooked(empty, "publish", "teachers/alpha/zarr.json", between), plan, spec, "run")


def test_a_teacher_that_was_begun_is_no_teacher_yet(small_cache: SmallCache) -> None:
    (small_cache.path / "teachers/alpha/zarr.json").unlink()
    (small_cache.path / "teachers/notes.txt").write_text("mine")
    assert teacher_names(small_cache.storage) == ["beta"]
    assert teacher_folders(small_cache.storage) == ["alpha", "beta"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights_digest": "ab"}, 'weights_digest: expected "1d1d.*found "ab"'),
        ({"precision": "bf16"}, 'precision: expected "fp32", found "bf16"'),
        ({"codec": CodecSpec(step=0.1)}, r"codec.step: expected 0.05, found 0.1"),
        ({"codec": CodecSpec(name="fp16")}, r"codec.name: expected \"uniform\", found \"fp16\""),
        ({"outputs": (OutputSpec(name="global", shape=(8,)),)}, "outputs.patch: .*found null"),
        ({"labels": (1, 2, 3, 4, 5)}, r"labels: expected null, found \[1, 2"),
        ({"model": "timm:other"}, "model: expected"),
    ],
)
def test_another_version_of_a_teacher_is_refused_by_what_differs(
    small_cache: SmallCache, changes: dict, message: str
) -> None:
    spec = teacher_spec("alpha", **changes)
    before = tree(small_cache.path)
    with (
        lease(small_cache.storage, "again"),
        pytest.raises(MismatchError, match=f"'alpha'.*{message}.*new teacher name"),
    ):
        publish_teacher(small_cache.storage, small_cache.plan, spec, {}, None, "again")
    assert tree(small_cache.path) == before


def test_weights_and_code_may_have_moved() -> None:
    spec, moved = (
        teacher_spec("alpha"),
        teacher_spec("alpha", weights="elsewhere.pt", model="torch:/moved/alpha.py:make"),
    )
    assert spec != moved and list_differences(spec, moved) == []
    check_same(spec, moved)  # raises otherwise
    renamed = teacher_spec("alpha", model="torch:/moved/alpha.py:other")
    with pytest.raises(MismatchError, match="model: expected"):
        check_same(spec, renamed)


@pytest.mark.parametrize("name", ["../up", "commits", "A", "", "a/b"])
def test_names_that_cannot_be_folders_are_refused(empty: Storage, name: str) -> None:
    with lease(empty, "run"), pytest.raises(ConfigError, match="name"):
        publish_teacher(empty, load_plan(empty), teacher_spec("beta", name=name), {}, None, "run")


FILES = ["zarr.json", "global/zarr.json", "patch/zarr.json", "stats.safetensors", "head.safetensors"]


@pytest.mark.parametrize("file", FILES)
def test_any_damaged_byte_of_a_teachers_files_is_named(small_cache: SmallCache, file: str) -> None:
    path = small_cache.path / "teachers/alpha" / file
    raw = path.read_bytes()
    places = np.linspace(0, len(raw) - 1, 25).astype(int) if len(raw) > 25 else range(len(raw))
    if file == "zarr.json":
        places = range(0, len(raw), 7)  # this one carries its own digest
    for place in places:
        damaged = bytearray(raw)
        damaged[place] ^= 0x20 if place % 2 else 1
        path.write_bytes(damaged)
        with pytest.raises(CorruptError) as error:
            if file == "zarr.json":
                read_teacher(small_cache.storage, "alpha")
            load_teacher(small_cache.storage, small_cache.plan, "alpha")
        assert (error.value.file, error.value.teacher) == (f"teachers/alpha/{file}", "alpha")
    path.unlink()
    with pytest.raises(CorruptError, match=f"^teachers/alpha/{file}: is missing"):
        load_teacher(small_cache.storage, small_cache.plan, "alpha")


def test_both_parts_of_the_fingerprint_tell_model_and_grid_apart(empty: Storage) -> None:
    plan = load_plan(empty)
    spec = teacher_spec("beta")
    with lease(empty, "run"):
        one = make_teacher(empty, plan, spec, "run")
        borrowed = publish_teacher(
            empty, plan, teacher_spec("beta", name="gamma"), one.statistics, None, "run", calibration="beta"
        )
        coarse = CodecSpec(step=0.2)
        statistics = statistics_of(teacher_spec("beta", codec=coarse))
        other = publish_teacher(empty, plan, teacher_spec("beta", name="delta", codec=coarse), statistics, None, "run")
    assert one.encoding_fingerprint == borrowed.encoding_fingerprint != other.encoding_fingerprint
    assert one.model_fingerprint == borrowed.model_fingerprint == other.model_fingerprint
    assert one.fingerprint == borrowed.fingerprint != other.fingerprint
    assert read_teacher(empty, "gamma").files["stats.safetensors"] != one.files["stats.safetensors"]


def test_the_array_describes_its_own_encoding(small_cache: SmallCache) -> None:
    attributes = json.loads((small_cache.path / "teachers/alpha/patch/zarr.json").read_bytes())["attributes"]["kpu"]
    grid = small_cache.teachers["alpha"].grids["patch"]
    assert attributes["codec"] == "uniform"
    assert attributes["step"] == 0.05
    assert attributes["grid"] == [2, 2]
    assert np.array_equal(np.float32(attributes["centre"]), grid.centre)
    assert np.array_equal(np.float32(attributes["scale"]), grid.scale)
