"""`repair` withdraws what is damaged, and nothing else; the same extraction then makes the cache what it was."""

import re
from pathlib import Path

import pytest

from kpu.errors import NotACacheError, StorageError
from kpu.storage.leases import lease
from kpu.storage.local import LocalStorage
from kpu.tools.repair import repair
from kpu.tools.status import status
from kpu.tools.verify import verify
from tests.support.builders import OUTPUTS, SmallCache, build, commit_unit, make_plan, make_teacher, teacher_spec, tree

TEACHERS = tuple(OUTPUTS)


def of_unit(path: Path, unit: int) -> list[str]:
    """Its records and shards."""
    return [file for file in tree(path) if re.search(rf"/0*{unit}\.|/c/{unit}(/|$)", file)]


def damage(file: Path, how: str) -> None:
    raw = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    else:
        raw[len(raw) // 2] ^= 0x20
        file.write_bytes(raw)


@pytest.mark.parametrize("how", ["removed", "flipped"])
@pytest.mark.parametrize("codec", ["uniform", "fp16", "uniform in tars"])
def test_any_damaged_unit_is_made_again_to_the_byte(cache_of, codec: str, how: str) -> None:
    small = cache_of(codec)
    sound = tree(small.path)
    files = of_unit(small.path, 1)
    assert len(files) == 3 + 1 + len(TEACHERS) * 3
    for file in files:
        damage(small.path / file, how)
        assert not verify(small.path).ok, file
        assert repair(small.path).left == (), file
        assert not status(small.path).complete, file
        build(small.path, codec=codec)
        assert tree(small.path) == sound, file
        assert status(small.path).complete, file


def test_only_the_records_of_damaged_units_are_withdrawn(small_cache: SmallCache) -> None:
    damage(small_cache.path / "teachers/beta/layer6.patch/c/1/0/0", "flipped")
    damage(small_cache.path / "teachers/alpha/global/c/2/0", "removed")
    before = tree(small_cache.path)
    planned = repair(small_cache.path, dry_run=True)
    assert tree(small_cache.path) == before
    withdrawn = ("teachers/alpha/commits/000002.json", "teachers/beta/commits/000001.json")
    assert repair(small_cache.path) == planned
    assert (planned.withdrawn, planned.left) == (withdrawn, ())
    after = tree(small_cache.path)
    assert after == {file: raw for file, raw in before.items() if file not in withdrawn}
    aside = [path for path in (small_cache.path / ".tmp/quarantine").rglob("*") if path.is_file()]
    assert sorted(path.read_bytes() for path in aside) == sorted(before[file] for file in withdrawn)


@pytest.mark.parametrize("file", ["images/status/c/1", "images/commits/000001.json"])
@pytest.mark.parametrize("how", ["removed", "flipped"])
def test_where_images_are_damaged_every_teacher_of_the_unit_is_withdrawn(
    small_cache: SmallCache, file: str, how: str
) -> None:
    """Nobody remembers then which images the teachers saw."""
    damage(small_cache.path / file, how)
    teachers = tuple(f"teachers/{name}/commits/000001.json" for name in TEACHERS)
    lost = file.endswith(".json") and how == "removed"
    assert repair(small_cache.path).withdrawn == teachers + (() if lost else ("images/commits/000001.json",))


def test_images_that_are_lost_make_a_cache_incomplete(small_cache: SmallCache) -> None:
    (small_cache.path / "images/commits/000000.json").unlink()
    found = status(small_cache.path)
    assert (found.complete, found.lost_images) == (False, [0])


def test_what_no_unit_can_mend_is_left_and_said(small_cache: SmallCache) -> None:
    (small_cache.path / "teachers/alpha/notes.txt").write_text("mine")
    damage(small_cache.path / "teachers/alpha/head.safetensors", "flipped")
    (small_cache.path / "teachers/beta/global/c/7").mkdir()
    before = tree(small_cache.path)
    done = repair(small_cache.path)
    assert done.withdrawn == ()
    assert {problem.file for problem in done.left} == {
        "teachers/alpha/head.safetensors", "teachers/alpha/notes.txt", "teachers/beta/global/c/7"
    }  # fmt: skip
    assert tree(small_cache.path) == before


def test_a_place_that_fails_is_no_damage(small_cache: SmallCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost mount must not send a cache back to its beginning."""
    opened = LocalStorage.open

    def fail(storage: LocalStorage, key: str) -> object:
        if key.startswith("teachers/beta/"):
            raise StorageError(f"{key}: stale file handle")
        return opened(storage, key)

    monkeypatch.setattr(LocalStorage, "open", fail)
    done = repair(small_cache.path)
    assert done.withdrawn == ()
    assert {problem.kind for problem in done.left} == {"unreadable"}


def test_units_that_are_not_committed_yet_are_no_damage(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "a.kpu", create=True)
    with lease(storage, "run"):
        plan = make_plan(storage, "run")
        teacher = make_teacher(storage, plan, teacher_spec("alpha"), "run")
        commit_unit(storage, plan, teacher, 1, "run")
    done = repair(tmp_path / "a.kpu")
    assert (done.withdrawn, done.left) == ((), ())
    assert {problem.kind for problem in done.report.problems} == {"absent"}


def test_a_sound_cache_stays_as_it_is(small_cache: SmallCache) -> None:
    before = tree(small_cache.path)
    done = repair(small_cache.path)
    assert (done.report.ok, done.withdrawn, done.left) == (True, (), ())
    assert tree(small_cache.path) == before


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotACacheError):
        repair(tmp_path)
