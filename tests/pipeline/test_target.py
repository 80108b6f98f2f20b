"""Leaving the place of a cache as it was where a run cannot start: only what this run made, only if nobody needs it."""

from pathlib import Path

import pytest

from cache.errors import SourceError
from cache.leases import lease
from cache.locations import open_storage
from pipeline.target import left_as_it_was, standing_plan
from tests.cache.builders import build, make_plan


def begin(out: Path, run: str = "mine", error: type[BaseException] = SourceError) -> None:
    """Plan a cache, then fail."""
    with left_as_it_was(str(out)):
        storage = open_storage(out, create=True)
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
    assert standing_plan(str(tmp_path / "o.kpu")) is not None
    with pytest.raises(SourceError):  # it was there before this start
        begin(tmp_path / "o.kpu")
    assert standing_plan(str(tmp_path / "o.kpu")) is not None


def test_another_run_at_work_keeps_what_was_made(tmp_path: Path) -> None:
    out = tmp_path / "o.kpu"
    failing = left_as_it_was(str(out))
    failing.__enter__()  # both start before anything stands
    storage = open_storage(out, create=True)
    with lease(storage, "other"):
        made = make_plan(storage, "other")
        assert not failing.__exit__(SourceError, SourceError("no images"), None)
        assert standing_plan(str(out)) == made


def test_what_was_moved_aside_is_kept_while_another_run_lives(tmp_path: Path) -> None:
    out = tmp_path / "o.kpu"
    with pytest.raises(SourceError), left_as_it_was(str(out)):
        storage = open_storage(out, create=True)
        other = lease(storage, "other")
        other.__enter__()
        storage.publish("zarr.json", b"{}", run="other")
        storage.quarantine("zarr.json", run="other")
        raise SourceError("no images")
    assert (out / ".tmp/quarantine/other/zarr.json").exists()
    other.__exit__(None, None, None)


def test_what_was_moved_aside_is_gone_with_the_rest(tmp_path: Path) -> None:
    with pytest.raises(SourceError), left_as_it_was(str(tmp_path / "o.kpu")):
        storage = open_storage(tmp_path / "o.kpu", create=True)
        with lease(storage, "mine"):
            storage.publish("zarr.json", b"{}", run="mine")
            storage.quarantine("zarr.json", run="mine")
        raise SourceError("no images")
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_stands_keeps_the_cache(tmp_path: Path) -> None:
    out = tmp_path / "o.kpu"
    with pytest.raises(SourceError), left_as_it_was(str(out)):
        build(out)
        raise SourceError("a later image cannot be read")
    assert (out / "teachers/alpha/zarr.json").exists()


def test_a_cache_that_a_run_began_is_no_foreign_folder(tmp_path: Path) -> None:
    storage = open_storage(tmp_path, create=True)
    with lease(storage, "killed"):
        storage.replace("runs/killed.json", b"{}", run="killed")
        assert standing_plan(str(tmp_path)) is None
