"""Adding a teacher to a cache that exists: its source is known, and teachers that are complete are not loaded."""

import json
from pathlib import Path

import pytest

from kpu import open_cache
from kpu.errors import ConfigError
from kpu.format.plan import SourceSpec
from pipeline.recorded import data_of, planned_data
from tests.support.toys import assert_refused, kpu, snapshot, write_images, write_teacher


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A cache with one teacher; the working directory plays no part."""
    teacher = write_teacher(tmp_path)
    images = write_images(tmp_path / "images", 6)
    result = kpu("extract", images, "-o", tmp_path / "my.kpu", "-t", f"first={teacher}:toy")
    assert result.exit_code == 0, result.output
    return tmp_path / "my.kpu"


def test_a_teacher_is_added_without_naming_the_source(made: Path, tmp_path: Path) -> None:
    result = kpu("extract", "-o", made, "-t", f"second={tmp_path}/toy.py:wider".replace("=", "=torch:", 1))
    assert result.exit_code == 0, result.output
    assert set(open_cache(made).teachers) == {"first", "second"}
    assert_refused(kpu("extract", "-o", tmp_path / "none.kpu", "-t", "a=timm:x"), "DATA or data.source")


def test_the_source_is_the_one_that_was_planned(made: Path, tmp_path: Path) -> None:
    data = data_of(str(made))
    assert data is not None and data["source"] == str(tmp_path / "images")
    (record,) = (made / "runs").glob("*.json")
    written = json.loads(record.read_text())
    written["config"]["data"] = {"source": "/etc", "limit": 1}
    record.write_text(json.dumps(written))
    assert data_of(str(made)) == {"source": str(tmp_path / "images"), "limit": 6}
    assert data_of(str(tmp_path / "none.kpu")) is None
    with pytest.raises(ConfigError, match=r"plan\.json: names 'http://there/images'.*-c, as data.source"):
        planned_data(SourceSpec(kind="folder", root="http://there/images"), 6, {})


def test_complete_teachers_are_not_loaded_again(made: Path, tmp_path: Path) -> None:
    (tmp_path / "second.py").write_bytes((tmp_path / "toy.py").read_bytes())
    (tmp_path / "toy.py").unlink()
    first, second = f"first=torch:{tmp_path}/toy.py:toy", f"second=torch:{tmp_path}/second.py:wider"
    before = snapshot(made / "teachers/first")
    result = kpu("extract", "-o", made, "-t", first, "-t", second)
    assert result.exit_code == 0, result.output
    assert "load: second; complete already: first" in result.stdout
    assert snapshot(made / "teachers/first") == before


def test_a_complete_teacher_with_other_settings_is_loaded_and_refused(made: Path, tmp_path: Path) -> None:
    first, second = f"first=torch:{tmp_path}/toy.py:wider", f"second=torch:{tmp_path}/toy.py:toy"
    refused = kpu("extract", "-o", made, "-t", first, "-t", second)
    assert refused.exit_code == 2 and "first" in refused.stderr and "torch:toy" in refused.stderr.replace("'", "")
    assert set(open_cache(made).teachers) == {"first"}
