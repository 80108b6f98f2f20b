import os
import random
from pathlib import Path

import numpy as np
import pytest

from kpu.errors import CorruptError, KpuError, NotACacheError
from kpu.reading.cache import open_cache
from kpu.tools.status import status
from kpu.tools.verify import VerifyReport, verify
from kpu.util.digests import open_document, seal_document
from tests.support.builders import SmallCache, build, tree

SHARD_OF = {
    "global": "teachers/beta/global/c/{unit}/0",
    "layer6.patch": "teachers/beta/layer6.patch/c/{unit}/0/0",
}


def files_of(report: VerifyReport) -> set[str]:
    assert not report.ok
    return {problem.file for problem in report.problems}


@pytest.mark.parametrize("codec", ["uniform", "fp32", "fp16", "bf16", "uniform in tars", "bf16 in tars"])
def test_a_sound_cache_has_no_problem_and_every_file_is_read(built_cache, codec: str) -> None:
    path = built_cache(codec).path
    seen: list[tuple[int, int]] = []
    report = verify(path, progress=lambda done, units: seen.append((done, units)))
    assert report.ok, report.problems
    assert (report.files, report.bytes) == (len(tree(path)), sum(map(len, tree(path).values())))
    assert seen == [(3, 3)]
    assert report.as_json() == {"ok": True, "problems": [], "files": report.files, "bytes": report.bytes}


@pytest.mark.parametrize("codec", ["uniform", "fp32", "uniform in tars"])
def test_a_flipped_byte_anywhere_is_reported_with_its_file(cache_of, codec: str) -> None:
    small = cache_of(codec)
    rng = random.Random(codec)
    for file, raw in tree(small.path).items():
        places = {0, len(raw) - 1, rng.randrange(len(raw))}
        for place in places:
            damaged = bytearray(raw)
            damaged[place] ^= rng.choice((1, 0x20, 0xFF))
            (small.path / file).write_bytes(damaged)
            assert file in files_of(verify(small.path, threads=1)), f"byte {place} of {file}"
        (small.path / file).write_bytes(raw)
    assert verify(small.path).ok


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["uniform", "fp32", "uniform in tars"])
def test_flipped_bytes_all_through_every_file_are_reported(cache_of, codec: str) -> None:
    """With KPU_TEST_EVERY_BYTE=1 every single byte, else every 13th."""
    small = cache_of(codec)
    stride = 1 if os.environ.get("KPU_TEST_EVERY_BYTE") else 13
    for file, raw in tree(small.path).items():
        for place in range(len(file) % stride, len(raw), stride):
            damaged = bytearray(raw)
            damaged[place] ^= 1 << place % 8
            (small.path / file).write_bytes(damaged)
            assert file in files_of(verify(small.path, threads=1)), f"byte {place} of {file}"
        (small.path / file).write_bytes(raw)


def test_a_removed_truncated_or_lengthened_file_is_reported(small_cache: SmallCache) -> None:
    for file, raw in tree(small_cache.path).items():
        path = small_cache.path / file
        for damaged in (raw[:-1], raw[: len(raw) // 2], raw + b"\n"):
            path.write_bytes(damaged)
            assert file in files_of(verify(small_cache.path)), f"{len(damaged)} of {len(raw)} bytes of {file}"
        path.unlink()
        assert file in files_of(verify(small_cache.path)), f"{file} removed"
        path.write_bytes(raw)
    assert verify(small_cache.path).ok


@pytest.mark.parametrize("codec", ["uniform", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("output", list(SHARD_OF))
def test_two_units_that_swapped_their_shards_are_reported_and_not_read(cache_of, codec: str, output: str) -> None:
    small = cache_of(codec)
    one, other = (SHARD_OF[output].format(unit=unit) for unit in (0, 1))
    first, second = (small.path / one).read_bytes(), (small.path / other).read_bytes()
    if codec != "uniform":
        assert len(first) == len(second)
    (small.path / one).write_bytes(second)
    (small.path / other).write_bytes(first)
    report = verify(small.path)
    assert files_of(report) == {one, other}
    assert {(problem.unit, problem.teacher) for problem in report.problems} == {(0, "beta"), (1, "beta")}
    for rows in ([0], [8], slice(None)):
        with pytest.raises(CorruptError):
            open_cache(small.path).read("beta", output, rows, masked="nan")


@pytest.mark.parametrize("codec", ["uniform", "fp16"])
def test_two_tars_that_were_swapped_cut_or_removed_are_reported_and_not_read(cache_of, codec: str) -> None:
    small = cache_of(f"{codec} in tars")
    one, other = (small.path / f"teachers/beta/layer6.patch/00000{unit}.tar" for unit in (0, 1))
    first, second = one.read_bytes(), other.read_bytes()
    for damaged in (second, first[:-1], first + b"\0", None):
        one.write_bytes(damaged) if damaged is not None else one.unlink()
        (problem,) = verify(small.path).problems
        assert (problem.file, problem.unit, problem.teacher) == ("teachers/beta/layer6.patch/000000.tar", 0, "beta")
        with pytest.raises(CorruptError):
            open_cache(small.path).read("beta", "layer6.patch", [0])


@pytest.mark.parametrize("name", ["000003.tar", "0.tar", "000000.tar.part", "c", "notes.txt"])
def test_what_does_not_belong_beside_tars_is_reported(cache_of, name: str) -> None:
    path = cache_of("uniform in tars").path
    (path / "teachers/alpha/patch" / name).write_bytes(b"x")
    (problem,) = verify(path).problems
    assert (problem.file, problem.reason) == (f"teachers/alpha/patch/{name}", "does not belong to the cache")


@pytest.mark.parametrize("what", ["images/digest/c/{}/0", "images/size/c/{}/0", "images/commits/00000{}.json",
                                  "teachers/alpha/commits/00000{}.json"])  # fmt: skip
def test_swapped_records_and_image_shards_are_reported(small_cache: SmallCache, what: str) -> None:
    one, other = what.format(0), what.format(1)
    first, second = (small_cache.path / one).read_bytes(), (small_cache.path / other).read_bytes()
    (small_cache.path / one).write_bytes(second)
    (small_cache.path / other).write_bytes(first)
    assert {one, other} <= files_of(verify(small_cache.path))


def test_files_of_another_cache_do_not_pass(small_cache: SmallCache, tmp_path: Path) -> None:
    """Sound files of the same names, of a cache with another codec."""
    other = build(tmp_path / "other.kpu", codec="fp16")
    for file in ("teachers/alpha/zarr.json", "teachers/beta/commits/000000.json", "teachers/beta/global/zarr.json"):
        raw = (small_cache.path / file).read_bytes()
        (small_cache.path / file).write_bytes((other.path / file).read_bytes())
        assert not verify(small_cache.path).ok, file
        (small_cache.path / file).write_bytes(raw)


@pytest.mark.parametrize(
    "file",
    [
        "teachers/alpha/patch/c/7/0/0",
        "teachers/alpha/patch/c/01/0/0",
        "teachers/alpha/patch/c/1/0/1",
        "teachers/alpha/patch/c/1/0/0.part",
        "teachers/alpha/patch/c/1/x",
        "teachers/alpha/patch/notes.txt",
        "teachers/alpha/commits/000003.json",
        "teachers/alpha/commits/1.json",
        "teachers/alpha/depth/zarr.json",
        "teachers/beta/head.safetensors",
        "teachers/notes.txt",
        "images/commits/000000.json.bak",
        "images/status/c/0.tmp",
        "images/thumbs/zarr.json",
        "samples/part-000001.parquet",
    ],
)
def test_what_does_not_belong_is_reported(small_cache: SmallCache, file: str) -> None:
    path = small_cache.path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    (problem,) = verify(small_cache.path).problems
    assert file.startswith(problem.file)
    assert problem.reason == "does not belong to the cache"


def test_runs_and_temporaries_are_nobodys_problem(small_cache: SmallCache) -> None:
    for file in ("runs/1.json", ".tmp/x/y", "README.txt"):
        (small_cache.path / file).parent.mkdir(parents=True, exist_ok=True)
        (small_cache.path / file).write_bytes(b"x")
    assert verify(small_cache.path).ok


def test_what_is_not_committed_is_reported(small_cache: SmallCache) -> None:
    record = "teachers/alpha/commits/000001.json"
    (small_cache.path / record).unlink()
    (problem,) = verify(small_cache.path).problems
    assert (problem.file, problem.unit, problem.teacher) == (record, 1, "alpha")
    assert problem.reason == "is missing: the unit is not committed"


def test_a_teacher_that_was_only_begun_is_reported(small_cache: SmallCache) -> None:
    (small_cache.path / "teachers/alpha/zarr.json").unlink()
    (problem,) = verify(small_cache.path).problems
    assert (problem.file, problem.teacher) == ("teachers/alpha/zarr.json", "alpha")


def test_nothing_hides_behind_the_first_problem(small_cache: SmallCache) -> None:
    damaged = {
        "zarr.json",
        "samples/part-000000.parquet",
        "images/commits/000000.json",
        "images/size/c/1/0",
        "teachers/alpha/stats.safetensors",
        "teachers/alpha/head.safetensors",
        "teachers/alpha/global/zarr.json",
        "teachers/alpha/global/c/2/0",
        "teachers/beta/commits/000002.json",
        "teachers/beta/layer6.patch/c/0/0/0",
    }
    for file in damaged:
        raw = bytearray((small_cache.path / file).read_bytes())
        raw[len(raw) // 3] ^= 4
        (small_cache.path / file).write_bytes(raw)
    assert files_of(verify(small_cache.path)) == damaged


@pytest.mark.parametrize("field", ["row_digest", "masked_digest", "fingerprint", "files", "nonfinite", "outputs"])
def test_a_record_that_contradicts_the_rest_is_reported(small_cache: SmallCache, field: str) -> None:
    """A well-formed record, its own digest right, which says something else than the other files."""
    file = "teachers/beta/commits/000001.json"
    document = open_document((small_cache.path / file).read_bytes(), file)
    del document["digest"]
    value = {"files": {}, "nonfinite": "ffff", "outputs": {"global": document["outputs"]["global"]}}
    document[field] = value.get(field, "00" * 16)
    (small_cache.path / file).write_bytes(seal_document(document))
    assert file in files_of(verify(small_cache.path))


def test_where_there_is_no_cache_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotACacheError, match="found an empty folder"):
        verify(tmp_path)


def test_random_damage_is_never_read_as_numbers(small_cache: SmallCache) -> None:
    """Whatever one file becomes, every row is either right or an error."""
    rng = random.Random(1)
    cache = open_cache(small_cache.path)
    truth = {
        (name, output): cache.read(name, output, slice(None), masked="nan")
        for name, teacher in cache.teachers.items()
        for output in teacher.outputs
    }
    files = list(tree(small_cache.path))
    read = refused = 0
    for _ in range(30):
        path = small_cache.path / rng.choice(files)
        raw = path.read_bytes()
        damaged = bytearray(raw)
        damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        for (name, output), values in truth.items():
            for rows in ([rng.randrange(20)], slice(None)):
                try:
                    found = open_cache(small_cache.path).read(name, output, rows, masked="nan")
                except KpuError:
                    refused += 1
                    continue
                read += 1
                assert np.array_equal(found, values[rows], equal_nan=True)
        path.write_bytes(raw)
    assert read > 100 and refused > 30


def test_a_cache_in_an_object_store_is_the_same_cache(s3_bucket: str, built_cache) -> None:
    url = f"{s3_bucket}/{os.urandom(4).hex()}/my.kpu"
    remote, local = build(url), built_cache("uniform")
    for file, raw in tree(local.path).items():
        assert remote.storage.read(file) == raw, file
    assert verify(url).as_json() == verify(local.path).as_json()
    assert status(url) == status(local.path)
    rows = [19, 3, 3, 12]
    assert np.array_equal(
        open_cache(url).read("beta", "layer6.patch", rows), open_cache(local.path).read("beta", "layer6.patch", rows)
    )
    shard = "teachers/beta/layer6.patch/c/1/0/0"
    remote.storage.quarantine(shard, run="x")
    assert files_of(verify(url)) == {shard}
    with pytest.raises(CorruptError, match="is missing"):
        open_cache(url).read("beta", "layer6.patch", rows)
