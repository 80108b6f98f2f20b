"""Leaving the place of a cache as it was where a run cannot start: only what this run made, only if nobody needs it."""

from pathlib import Path

import pytest

from kpu.errors import SourceError
from kpu.storage.leases import lease
from kpu.storage.open import open_storage
from pipeline.target import cleanup_on_failure, existing_plan
from tests.support.builders import build, make_plan


def begin(out: Path, run: str = "mine", error: type[BaseException] = SourceError) -> None:
    """Plan a cache, then fail."""
    with cleanup_on_failure(str(out)) as created:
        storage = open_storage(out, create=True, created=created)
        with lease(storage, run):
            make_plan(storage, run)
            storage.replace(f"runs/{run}.json", b"{}", run=run)
            raise error("no images")


def test_what_a_failed_start_made_is_gone(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        begin(tmp_path / "deep" / "o.kpu")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SourceError):
        begin(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_keeps_what_was_made(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "o.kpu", error=KeyboardInterrupt)
    assert existing_plan(str(tmp_path / "o.kpu")) is not None
    with pytest.raises(SourceError):  # it was there before this start
        begin(tmp_path / "o.kpu")
    assert existing_plan(str(tmp_path / "o.kpu")) is not None


def test_another_run_at_work_keeps_what_was_made(tmp_path: Path) -> None:
    out = tmp_path / "o.kpu"
    failing = cleanup_on_failure(str(out))
    created = failing.__enter__()  # both start before anything stands
    open_storage(out, create=True, created=created)
    storage = open_storage(out, create=True)
    with lease(storage, "other"):
        made = make_plan(storage, "other")
        assert not failing.__exit__(SourceError, SourceError("no images"), None)
        assert existing_plan(str(out)) == made


def test_what_was_moved_aside_is_kept_while_another_run_lives(tmp_path: Path) -> None:
    out = tmp_path / "o.kpu"
    with pytest.raises(SourceError), cleanup_on_failure(str(out)) as created:
        storage = open_storage(out, create=True, created=created)
        other = lease(storage, "other")
        other.__enter__()
        storage.publish("zarr.json", b"{}", run="other")
        storage.quarantine("zarr.json", run="other")
        raise SourceError("no images")
    assert (out / ".tmp/quarantine/other/zarr.json").exists()
    other.__exit__(None, None, None)


def test_what_was_moved_aside_is_gone_with_the_rest(tmp_path: Path) -> None:
    with pytest.raises(SourceError), cleanup_on_failure(str(tmp_path / "o.kpu")) as created:
        storage = open_storage(tmp_path / "o.kpu", create=True, created=created)
        with lease(storage, "mine"):
            storage.publish("zarr.json", b"{}", run="mine")
            storage.quarantine("zarr.json", run="mine")
        raise SourceError("no images")
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_stands_keeps_the_cache(tmp_path: Path) -> None:
    out = tmp_path / "o.kpu"
    with pytest.raises(SourceError), cleanup_on_failure(str(out)):
        build(out)
        raise SourceError("a later image cannot be read")
    assert (out / "teachers/alpha/zarr.json").exists()


def test_files_that_somebody_put_there_meanwhile_stay(tmp_path: Path) -> None:
    out = tmp_path / "o"
    out.mkdir()
    with pytest.raises(SourceError), cleanup_on_failure(str(out)) as created:
        for name in ("images", "samples", "runs", "teachers"):  # while teachers load
            (out / name / "mine").mkdir(parents=True)
            (out / name / "mine/picture.png").write_bytes(b"precious")
        (out / ".tmp/old").mkdir(parents=True)
        (out / ".tmp/old/notes.txt").write_bytes(b"precious")
        storage = open_storage(out, create=True, created=created)
        with lease(storage, "mine"):
            make_plan(storage, "mine")
            storage.replace("runs/mine.json", b"{}", run="mine")
            raise SourceError("no images")
    kept = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert kept == [".tmp/old/notes.txt", *(f"{n}/mine/picture.png" for n in ("images", "runs", "samples", "teachers"))]
    assert not (out / "images/digest").exists()


def test_a_failure_before_anything_was_made_removes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "o"
    out.mkdir()
    with pytest.raises(SourceError), cleanup_on_failure(str(out)):
        for name in ("images", "samples", "runs", "zarr.json", "plan.json"):
            (out / name).mkdir()
        raise SourceError("no images")
    assert sorted(path.name for path in out.iterdir()) == ["images", "plan.json", "runs", "samples", "zarr.json"]


def test_a_failed_start_follows_no_link(tmp_path: Path) -> None:
    out, outside = tmp_path / "o", tmp_path / "outside"
    outside.mkdir()
    (outside / "plan.json").write_bytes(b"precious")
    with pytest.raises(SourceError), cleanup_on_failure(str(out)) as created:
        storage = open_storage(out, create=True, created=created)
        with lease(storage, "mine"):
            storage.publish("samples/part-000000.parquet", b"ours", run="mine")
        (out / "samples").rename(tmp_path / "moved")
        (out / "samples").symlink_to(outside)
        (outside / "part-000000.parquet").write_bytes(b"precious")
        raise SourceError("no images")
    assert (outside / "part-000000.parquet").read_bytes() == (outside / "plan.json").read_bytes() == b"precious"


def test_a_cache_that_a_run_began_is_no_foreign_folder(tmp_path: Path) -> None:
    storage = open_storage(tmp_path, create=True)
    with lease(storage, "killed"):
        storage.replace("runs/killed.json", b"{}", run="killed")
        assert existing_plan(str(tmp_path)) is None
