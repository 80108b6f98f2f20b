"""Commands on caches that others made: what lies outside is neither read nor deleted, and no password is shown."""

import json
from pathlib import Path

import pytest

from tests.support.theia import build_pictured
from tests.support.toys import kpu, write_images, write_teacher


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the user's."""
    folder = tmp_path / "outside"
    for name in ("a/photo.jpg", "quarantine/run/notes.txt", "b/lease"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"precious")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("link", [".tmp", "runs", "teachers", "images", "samples"])
def test_no_command_deletes_or_writes_behind_a_link(tmp_path: Path, outside: Path, link: str) -> None:
    before = contents(outside)
    cache = tmp_path / "my.kpu"
    build_pictured(cache, tmp_path / "images")
    if (cache / link).exists():
        (cache / link).rename(tmp_path / "moved")
    (cache / link).symlink_to(outside)
    write_images(tmp_path / "own" / "cats", 3)
    write_teacher(tmp_path)
    teacher = f"t=torch:{tmp_path}/toy.py:toy"
    commands: list[tuple[object, ...]] = [
        ("gc", cache),
        ("extract", tmp_path / "own", "-t", teacher, "-o", cache),
        ("status", cache),
        ("verify", cache),
        ("repair", cache),
        ("export", cache, tmp_path / "copy.kpu"),
        ("export", cache, tmp_path / "theia", "--format", "theia", "--images", tmp_path / "images"),
    ]
    refused = []
    for command in commands:
        ended = kpu(*command)
        assert contents(outside) == before, command
        assert sorted(path.name for path in outside.iterdir()) == ["a", "b", "quarantine"]
        assert ended.exit_code in (0, 1, 2), (command, ended.output)
        assert ended.exception is None or isinstance(ended.exception, SystemExit), command
        if f"symbolic link {link} " in " ".join(ended.output.split()):
            refused.append(command[0])
    if link == ".tmp":
        assert refused == ["gc", "extract"], "the others do not look there"
    else:
        assert refused


def test_extract_into_a_folder_with_a_linked_tmp_is_refused(tmp_path: Path, outside: Path) -> None:
    before, cache = contents(outside), tmp_path / "my.kpu"
    cache.mkdir()
    (cache / ".tmp").symlink_to(outside)
    write_images(tmp_path / "own" / "cats", 3)
    write_teacher(tmp_path)
    ended = kpu("extract", tmp_path / "own", "-t", f"t=torch:{tmp_path}/toy.py:toy", "-o", cache)
    assert ended.exit_code == 2, ended.output
    assert "symbolic link .tmp" in " ".join(ended.output.split())
    assert contents(outside) == before
    assert sorted(path.name for path in cache.iterdir()) == [".tmp"]


def test_info_hides_a_password_that_an_older_release_recorded(tmp_path: Path) -> None:
    build_pictured(tmp_path / "my.kpu", tmp_path / "images", root="https://me:hunter2@host/x?X-Amz-Signature=abc")
    for options in ((), ("--json",)):
        ended = kpu("info", tmp_path / "my.kpu", *options)
        assert ended.exit_code == 0, ended.output
        assert "https://me:***@host/x?X-Amz-Signature=***" in ended.output
        assert "hunter2" not in ended.output
    assert json.loads(ended.stdout)["source"]["kind"] == "folder"


@pytest.mark.parametrize(
    "arguments",
    [
        ("https://me:hunter2@host/x.tar", "-o", "my.kpu"),
        ("https://b.s3.amazonaws.com/x.tar?X-Amz-Signature=hunter2", "-o", "my.kpu"),
        ("images", "-o", "s3://key:hunter2@bucket/my.kpu"),
        ("images", "-o", "my.kpu", "--set", "calibration_from=s3://key:hunter2@bucket/x"),
    ],
)
def test_extract_refuses_a_location_with_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images" / "cats", 3)
    write_teacher(tmp_path)
    ended = kpu("extract", *arguments, "-t", "t=torch:toy.py:toy")
    assert ended.exit_code == 2, ended.output
    assert "expected a location without a password" in " ".join(ended.output.split())
    assert "hunter2" not in ended.output
    assert not (tmp_path / "my.kpu").exists()
