"""A cache in another format holds the same values under the same commits, and a conversion can be taken up again."""

import multiprocessing
import os
import shutil
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest

from kpu import open_cache
from kpu.errors import ConfigError, CorruptError, MismatchError
from kpu.interop.convert import convert
from kpu.records.units import load_record
from kpu.storage.leases import collect_garbage, dead_runs, lease
from kpu.storage.open import open_storage
from kpu.tools.verify import verify
from tests.support.builders import (
    MASKED_ROW,
    NONFINITE_ROW,
    ROWS,
    Hooked,
    SmallCache,
    build,
    make_plan,
    sample_table,
    tree,
)


@pytest.mark.parametrize("codec", ["uniform", "rotated", "fp32", "fp16", "bf16"])
def test_to_tars_and_back_gives_the_same_bytes(built_cache, tmp_path: Path, codec: str) -> None:
    zarr, tars = built_cache(codec).path, built_cache(f"{codec} in tars").path
    done = convert(zarr, tmp_path / "tars.kpu", shards="webdataset", run="there")
    assert (done.converted, done.existing, done.teachers) == (6, 0, ("alpha", "beta"))
    assert tree(tmp_path / "tars.kpu") == tree(tars)
    convert(tmp_path / "tars.kpu", tmp_path / "zarr.kpu", shards="zarr", run="back")
    assert tree(tmp_path / "zarr.kpu") == tree(zarr)
    assert verify(tmp_path / "tars.kpu").ok


def test_a_plan_that_comes_between_the_files_of_another_driver_stands(
    built_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = built_cache("uniform").path, tmp_path / "o.kpu"
    storage = open_storage(out, create=True)

    def other() -> None:
        with lease(storage, "other"), pytest.raises(ZeroDivisionError):
            make_plan(Hooked(storage, "publish", "plan.json", lambda: 1 // 0), "other", unit_rows=16)

    hooked = Hooked(storage, "publish", "plan.json", other)
    monkeypatch.setattr(
        "kpu.interop.convert.open_storage", lambda path, **_: hooked if path == out else open_storage(path)
    )
    with lease(storage, "r"):
        convert(source, out, shards="zarr", run="r")
    assert tree(out) == tree(source)


def test_only_the_format_of_a_teacher_changes(built_cache, tmp_path: Path) -> None:
    source = open_cache(built_cache("uniform").path)
    convert(source.path, tmp_path / "o.kpu", shards="webdataset", run="r", teachers=["beta"])
    out = open_cache(tmp_path / "o.kpu")
    assert list(out.teachers) == ["beta"]
    assert out.plan == source.plan
    there, here = source.teachers["beta"].published, out.teachers["beta"].published
    assert here.fingerprint == there.fingerprint
    assert here.spec == there.spec.model_copy(update={"format": "webdataset"})
    assert verify(out.path).ok


@pytest.mark.parametrize("codec", ["uniform", "rotated", "bf16", "uniform in tars"])
def test_dequantised_values_are_the_decoded_ones(built_cache, tmp_path: Path, codec: str) -> None:
    source = open_cache(built_cache(codec).path)
    convert(source.path, tmp_path / "o.kpu", shards="zarr", run="r", dequantise=True)
    out = open_cache(tmp_path / "o.kpu")
    assert verify(out.path).ok
    for name, teacher in source.teachers.items():
        assert out.teachers[name].spec.codec.name == "fp32"
        assert out.teachers[name].published.model_fingerprint == teacher.published.model_fingerprint
        for output in teacher.outputs:
            found, expected = (c.read(name, output, slice(None), masked="nan") for c in (out, source))
            reach = 2e-5 if codec == "rotated" else 0  # how a product is summed up depends on how many rows there are
            np.testing.assert_allclose(found, expected, rtol=reach, atol=reach)
        for unit in range(source.plan.units):
            kept, made = (load_record(open_storage(c.path), c.plan, name, unit) for c in (source, out))
            assert (made.row_digest, made.masked_digest, made.nonfinite) == (
                kept.row_digest,
                kept.masked_digest,
                kept.nonfinite,
            )
            assert {o: r.fidelity for o, r in made.outputs.items()} == {o: r.fidelity for o, r in kept.outputs.items()}
    valid = out.valid(teacher="alpha")
    assert np.flatnonzero(~valid).tolist() == [MASKED_ROW, NONFINITE_ROW]


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """Forks processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.builders", "kpu.interop.convert"])
    return context


def _convert_and_die(source: Path, out: Path, point: str, skip: int) -> None:
    os.environ |= {"KPU_FAILPOINT": point, "KPU_FAILPOINT_SKIP": str(skip)}
    convert(source, out, shards="webdataset", run="killed")


@pytest.mark.parametrize(
    ("point", "skip"),
    [("plan.samples", 0), ("teacher.arrays", 1), ("publish.linked", 25), ("unit.shards", 3)],
)
def test_a_killed_conversion_goes_on(
    server: ForkServerContext, built_cache, tmp_path: Path, point: str, skip: int
) -> None:
    source, out = built_cache("uniform").path, tmp_path / "o.kpu"
    process = server.Process(target=_convert_and_die, args=(source, out, point, skip))
    process.start()
    process.join(60)
    assert process.exitcode == -9, "the failpoint did not fire"
    before = {file: raw for file, raw in tree(out).items() if "/commits/" in file}
    done = convert(source, out, shards="webdataset", run="again")
    assert done.converted + done.existing == 6
    assert done.existing == sum(file.startswith("teachers") for file in before)
    assert before.items() <= tree(out).items()
    assert tree(out) == tree(built_cache("uniform in tars").path)
    assert dead_runs(open_storage(out)) == ["killed"]
    collect_garbage(open_storage(out), quarantine=True)
    assert convert(source, out, shards="webdataset", run="once more").converted == 0


def test_a_cache_of_another_plan_is_refused(built_cache, tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "o.kpu", create=True)
    with lease(storage, "r"):
        make_plan(storage, "r", sample_table(ROWS - 1))
    before = tree(tmp_path / "o.kpu")
    with pytest.raises(MismatchError, match="another plan"):
        convert(built_cache("uniform").path, tmp_path / "o.kpu", shards="zarr", run="x")
    assert tree(tmp_path / "o.kpu") == before


def test_other_teachers_that_an_earlier_export_left_are_named(small_cache: SmallCache, tmp_path: Path) -> None:
    out = tmp_path / "o.kpu"
    assert convert(small_cache.path, out, shards="zarr", run="r", teachers=["alpha"]).unfinished == ()
    (out / "teachers/alpha/commits/000001.json").unlink()
    done = convert(small_cache.path, out, shards="zarr", run="r", teachers=["beta"])
    assert done.unfinished == ("alpha",)


def test_another_format_or_content_under_the_same_name_is_refused(small_cache: SmallCache, tmp_path: Path) -> None:
    out = tmp_path / "o.kpu"
    convert(small_cache.path, out, shards="webdataset", run="r")
    with pytest.raises(MismatchError, match="was exported there with --format webdataset, found zarr"):
        convert(small_cache.path, out, shards="zarr", run="r")
    other = build(tmp_path / "other.kpu", codec="uniform in tars")
    record = other.path / "teachers/beta/commits/000002.json"
    shutil.copy(record.with_name("000001.json"), record)
    with pytest.raises(CorruptError):
        convert(other.path, out, shards="webdataset", run="r")


def test_an_incomplete_teacher_is_named_with_its_units(small_cache: SmallCache, tmp_path: Path) -> None:
    (small_cache.path / "teachers/beta/commits/000001.json").unlink()
    with pytest.raises(ConfigError, match=r"'beta': expected all 3 units, found 1 not committed \(unit 1\)"):
        convert(small_cache.path, tmp_path / "o.kpu", shards="zarr", run="r")
    assert not (tmp_path / "o.kpu").exists()
    convert(small_cache.path, tmp_path / "o.kpu", shards="zarr", run="r", teachers=["alpha"])
    with pytest.raises(ConfigError, match="'omega': expected one of"):
        convert(small_cache.path, tmp_path / "p.kpu", shards="zarr", run="r", teachers=["omega"])


@pytest.mark.parametrize("file", ["teachers/beta/global/c/1/0", "images/status/c/1"])
def test_damage_is_found_and_not_passed_on(small_cache: SmallCache, tmp_path: Path, file: str) -> None:
    raw = bytearray((small_cache.path / file).read_bytes())
    raw[5] ^= 1
    (small_cache.path / file).write_bytes(raw)
    with pytest.raises(CorruptError, match=file):
        convert(small_cache.path, tmp_path / "o.kpu", shards="webdataset", run="r")
    committed = open_cache(tmp_path / "o.kpu").teachers["beta"].committed()
    assert not committed[1]


def test_onto_itself_is_refused(small_cache: SmallCache) -> None:
    with pytest.raises(ConfigError, match="another place"):
        convert(small_cache.path, small_cache.path, shards="zarr", run="r")
