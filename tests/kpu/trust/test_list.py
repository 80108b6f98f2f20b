"""The user's list of trusted code, and what it lets run."""

import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kpu.errors import MismatchError, TrustError
from kpu.trust.code import Code, CodeLoader, find_module, naming, read_code, sha256
from kpu.trust.list import Trust, load_trust, remember, trust_list

KEY = "ab" * 32


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "config/kpu/trusted-code"
    monkeypatch.setenv("KPU_TRUSTED_CODE", str(place))
    return place


@pytest.mark.parametrize(("mode", "folder"), [(0o622, 0o700), (0o664, 0o700), (0o600, 0o777)])
def test_a_list_that_others_may_write_to_is_ignored(
    mode: int, folder: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "kpu/trusted-code"
    place.parent.mkdir(mode=0o700)
    place.write_text("0" * 64 + "\n")
    place.chmod(0o600)
    monkeypatch.setenv("KPU_TRUSTED_CODE", str(place))
    assert load_trust().listed == {"0" * 64}
    monkeypatch.setattr("kpu.trust.list._is_private", lambda _: False)
    place.chmod(mode)
    place.parent.chmod(folder)
    assert load_trust().listed == frozenset()


def test_where_the_list_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KPU_TRUSTED_CODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert trust_list() == tmp_path / ".config/kpu/trusted-code"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")  # which the specification says to ignore
    assert trust_list() == tmp_path / ".config/kpu/trusted-code"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "own"))
    assert trust_list() == tmp_path / "own/kpu/trusted-code"


def test_what_is_remembered_is_trusted_once(listed: Path) -> None:
    assert load_trust().listed == frozenset()
    assert remember({KEY: "/a\nb.py"}) is None
    assert remember({KEY: "/elsewhere.py"}) is None
    assert listed.read_text() == f"{KEY}  /a?b.py\n"
    assert stat.S_IMODE(listed.stat().st_mode) == 0o600
    assert load_trust().listed == {KEY}


def test_lines_as_sha256sum_prints_them_and_others(listed: Path, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("x = 1\n")
    listed.parent.mkdir(parents=True)
    printed = subprocess.run(["sha256sum", tmp_path / "m.py"], capture_output=True, text=True, check=True).stdout
    listed.write_text(f"# mine\n{KEY[:-1]}\n{printed}{KEY}x\n{KEY}")  # the last line is cut off
    key = sha256(b"x = 1\n")
    assert load_trust().listed == {key, KEY}
    assert remember({"cd" * 32: "/c.py"}) is None
    assert load_trust().listed == {key, KEY, "cd" * 32}


def test_writers_at_the_same_time(listed: Path) -> None:
    keys = [f"{number:064x}" for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda key: remember({key: f"/{key}.py"}), keys)) == {None}
    assert load_trust().listed == set(keys)
    assert len(listed.read_text().splitlines()) == len(keys)


def test_a_list_that_cannot_be_used_is_empty_and_said(listed: Path) -> None:
    listed.parent.mkdir(parents=True)
    listed.mkdir()
    assert load_trust().listed == frozenset()
    said = remember({KEY: "/a.py"})
    assert said is not None and "--trust-code" in said and str(listed) in said
    listed.rmdir()
    os.mkfifo(listed)  # whoever opens it waits for a writer
    assert load_trust().listed == frozenset()
    assert "no regular file" in (remember({KEY: "/a.py"}) or "")


def test_a_list_that_anyone_may_write_to_is_none(listed: Path) -> None:
    listed.parent.mkdir(parents=True)
    listed.write_text(f"{KEY}\n")
    listed.chmod(0o666)
    assert load_trust().listed == frozenset()
    assert "others may write to it" in (remember({KEY: "/a.py"}) or "")


# --- what runs ---


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def code(file: Path) -> Code:
    found = read_code(f"torch:{file}:make")
    assert found is not None
    return found


def test_the_bytes_that_were_read_are_those_that_run(tmp_path: Path) -> None:
    """Neither a file that changed since, nor a compiled one beside it."""
    file = write(tmp_path, own="VALUE = 1") / "own.py"
    found = code(file)
    file.write_text("raise RuntimeError('another version')")
    with CodeLoader(Trust(listed=frozenset([sha256(b"VALUE = 1")]))).imported(found, "m") as module:
        assert module.VALUE == 1
        assert module.__file__ == str(file)


def test_trust_goes_by_content_and_not_by_place(tmp_path: Path) -> None:
    file = write(tmp_path / "a", own="VALUE = 1") / "own.py"
    trust = Trust(listed=frozenset([sha256(file.read_bytes())]))
    elsewhere = shutil.copy(file, write(tmp_path / "b") / "other.py")
    CodeLoader(trust).require(code(Path(elsewhere)), "m")
    file.write_text("VALUE = 2")
    with pytest.raises(TrustError):
        CodeLoader(trust).require(code(file), "m")
    with pytest.raises(MismatchError, match="was not run; restore it"):
        CodeLoader(trust).require(code(file), "m", recorded="0" * 32)


@pytest.mark.parametrize("neighbour", ["helper.py", "helper/__init__.py", "package/part.py"])
def test_trusted_code_in_a_strangers_folder_does_not_run_what_lies_there(neighbour: str, tmp_path: Path) -> None:
    name = "package.part" if neighbour.startswith("package") else "helper"
    own, strange = write(tmp_path / "own", m=f"import {name}\n"), tmp_path / "strange"
    for folder, text in ((own, "VALUE = 1"), (strange, f"open({str(tmp_path / 'marker')!r}, 'w')")):
        (folder / neighbour).parent.mkdir(parents=True, exist_ok=True)
        (folder / "package").mkdir(exist_ok=True)
        (folder / "package/__init__.py").write_text("")
        (folder / neighbour).write_text(text)
    shutil.copy(own / "m.py", strange)
    loader = CodeLoader(naming(Trust(), code(own / "m.py")))
    with loader.imported(code(own / "m.py"), "m"):
        pass
    assert {sha256(each.read_bytes()) for each in (own / "m.py", own / neighbour)} <= loader.ran.keys()
    remembered = Trust(listed=frozenset(loader.ran))
    for trust in (remembered, naming(remembered, code(own / "m.py"))):
        with (
            pytest.raises(TrustError, match=str(strange / neighbour)),
            CodeLoader(trust).imported(code(strange / "m.py"), "m"),
        ):
            pass
    with CodeLoader(remembered).imported(code(own / "m.py"), "m"):  # one's own, from the list alone
        pass
    assert not (tmp_path / "marker").exists()
    assert not {"helper", "package", "package.part"} & sys.modules.keys()


def test_a_module_is_found_without_running_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deadly = "raise RuntimeError('it ran')"
    for folder in ("regular", "regular/inner"):
        write(tmp_path / folder, __init__=deadly, models=deadly)
    write(tmp_path / "namespace/inner", models=deadly)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("regular.models", "regular.inner.models", "namespace.inner.models"):
        assert find_module(name) == tmp_path / f"{name.replace('.', '/')}.py"
    assert find_module("regular.inner") == tmp_path / "regular/inner/__init__.py"
    assert (find_module("math"), find_module("none.such"), find_module("math.none")) == (None, None, None)
    with pytest.raises(TrustError, match=r"found module regular\.models \(.*models\.py\), SHA-256"):
        CodeLoader(Trust()).require(Code("regular.models", "f", find_module("regular.models"), b""), "m")
    assert "regular" not in sys.modules


def test_a_module_runs_as_the_bytes_that_are_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "pinned_package", __init__="", models="from pinned_package import other\nVALUE = 1", other="")
    monkeypatch.syspath_prepend(tmp_path)
    found = read_code("torch:pinned_package.models:make")
    assert found is not None and found.source is not None
    (tmp_path / "pinned_package/models.py").write_text("raise RuntimeError('another version')")
    with CodeLoader(Trust(listed=frozenset([sha256(found.source)]))).imported(found, "m") as module:
        assert module.VALUE == 1
    with pytest.raises(TrustError, match="no source file"):
        CodeLoader(Trust()).require(Code("math", "sqrt", None, None), "m")
    named = naming(Trust(), Code("math", "sqrt", None, None))
    with CodeLoader(named).imported(Code("math", "sqrt", None, None), "m") as module:
        assert module.sqrt(4) == 2


def test_does_not_read_pipes_and_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "zeros.py").symlink_to("/dev/zero")
    for name in ("pipe.py", "zeros.py", "absent.py"):
        with pytest.raises(OSError):
            read_code(f"torch:{tmp_path / name}:make")
