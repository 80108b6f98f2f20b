"""`status`, `info`, `verify`, `bench`, `gc` and `retry-failed`: their JSON, their text and their exit codes."""

import json
import shutil
from pathlib import Path

import pytest
import typer

from cli.cache import app
from kpu import open_cache
from tests.support.toys import assert_refused, kpu, kpu_json, noise, snapshot, write_images, write_teacher

COMMANDS = ("status", "info", "verify", "repair", "bench", "gc", "retry-failed")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("commands")
    images = write_images(place / "images" / "cats", 70)
    write_teacher(place)
    (images / "broken.png").write_bytes(b"no image")
    (images / "phone.psd").write_bytes(b"another image")
    assert kpu("extract", *arguments(place), "-o", place / "o.kpu").exit_code == 0
    return place / "o.kpu"


def arguments(place: Path) -> list[object]:
    """What is extracted there, and by whom."""
    model = f"torch:{place}/toy.py"
    return [place / "images", "-t", f"t={model}:toy", "-t", f"u={model}:wider", "--set", "teachers.u.codec.name=fp16"]


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "o.kpu"))


def test_status_of_a_complete_cache(original: Path) -> None:
    result = kpu("status", original, "--json")
    assert result.exit_code == 0
    status = json.loads(result.stdout)
    expected = {"complete", "rows", "units", "teachers", "masked", "failed", "lost_images", "left_out"}
    assert set(status) == expected | {"masked_reasons"}
    assert (status["complete"], status["rows"], status["units"]) == (True, 71, 2)
    assert status["masked"] == [{"key": "cats/broken.png", "row": 70, "reason": "not an image"}]
    assert (status["failed"], status["masked_reasons"]) == ([], {"not an image": 1})
    assert status["left_out"] == [{"reason": "with the ending .psd", "count": 1, "example": "cats/phone.psd"}]
    assert set(status["teachers"]) == {"t", "u"}
    for teacher in status["teachers"].values():
        assert set(teacher) == {"committed_units", "units", "committed_rows", "bytes", "rmse", "cosine", "saturated"}
        assert teacher["committed_units"] == teacher["units"] == 2 and teacher["committed_rows"] == 71
        assert 0 < teacher["rmse"] < 0.0145
    text = kpu("status", original).stdout
    assert "complete: 71 rows in 2 units, 1 masked" in text
    assert "left out: 1 with the ending .psd (cats/phone.psd)" in text
    assert "masked row 70: cats/broken.png (not an image)" in text


def test_status_of_an_incomplete_cache(out: Path) -> None:
    (out / "teachers/u/commits/000001.json").unlink()
    result = kpu("status", out)
    assert result.exit_code == 1
    assert "incomplete: 71 rows in 2 units" in result.stdout
    assert ["u", "1/2"] in [line.split()[:2] for line in result.stdout.splitlines()]


def test_values_that_no_integer_stands_for_are_counted_and_reported(original: Path, tmp_path: Path) -> None:
    """The calibration is that of images with hardly any contrast."""
    grey, toy = tmp_path / "grey", ("-t", f"t=torch:{original.parent}/toy.py:toy", "--set", "codec.step=0.001")
    for seed, path in enumerate(sorted(write_images(grey, 70).iterdir())):
        noise(seed).point(lambda value: 120 + value // 32).save(path)
    assert kpu("extract", grey, *toy, "-o", tmp_path / "grey.kpu").exit_code == 0
    assert "beyond the range" not in kpu("status", tmp_path / "grey.kpu").stdout

    arguments = (original.parent / "images", *toy, "--set", f"calibration_from={tmp_path}/grey.kpu")
    out = tmp_path / "o.kpu"
    text = kpu("extract", *arguments, "-o", out).stdout
    saturated = kpu_json("status", out)["teachers"]["t"]["saturated"]
    share = saturated / (70 * (6 + 4 * 6))
    assert share > 0.001
    assert f"warning: teacher t: {share:.2%} of the values are beyond the range of its codec" in text
    assert f"teacher t: {saturated:,} values beyond the range of its codec" in kpu("status", out).stdout
    assert kpu_json("extract", *arguments, "-o", tmp_path / "again.kpu")["saturated"] == {
        "t": pytest.approx(share, rel=1e-5)
    }


def test_info(original: Path) -> None:
    described = kpu_json("info", original)
    assert described["classes"] == ["cats"]
    assert described["teachers"]["t"]["outputs"][1] == {"name": "patch", "shape": [4, 6], "grid": [2, 2]}
    assert described["labels"] == 71
    text = kpu("info", original).stdout
    assert "labels   for 71 of 71 rows" in text
    assert "output   patch: 4 x 6 (grid 2 x 2), calibrated on 280 vectors" in text
    assert "codec    fp16" in text


def test_verify(out: Path) -> None:
    report = kpu_json("verify", "--deep", out)
    assert report["ok"] and report["problems"] == []
    assert "64 rows computed again" in kpu("verify", "--deep", out).stdout
    assert "71 rows computed again" in kpu("verify", "--deep", "--rows", 1000, out).stdout
    shard = out / "teachers/t/patch/c/1/0/0"
    raw = bytearray(shard.read_bytes())
    raw[7] ^= 1
    shard.write_bytes(raw)
    result = kpu("verify", "--deep", out, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert not report["ok"]
    assert [set(problem) for problem in report["problems"]] == [{"file", "unit", "teacher", "reason", "kind"}]
    assert [(p["file"], p["unit"], p["teacher"]) for p in report["problems"]] == [("teachers/t/patch/c/1/0/0", 1, "t")]
    text = kpu("verify", out)
    assert text.exit_code == 1
    assert "teachers/t/patch/c/1/0/0 (unit 1): " in text.stdout
    assert "1 problem" in text.stdout
    assert f"`kpu-cache repair {out}`" in text.stdout


def test_an_incomplete_cache_is_a_line_for_each_teacher(out: Path) -> None:
    for record in (out / "teachers/u/commits").iterdir():
        record.unlink()
    text = kpu("verify", out).stdout
    assert text.splitlines()[0] == "teachers/u/commits: 2 units not committed"
    assert "repair" not in text


def contents(cache: Path) -> dict[str, str]:
    return {file: digest for file, (_, digest) in snapshot(cache).items()}


def test_repair(original: Path, out: Path) -> None:
    before = contents(out)
    assert kpu("repair", out).stdout == f"sound: {out}\n"
    shard, images = out / "teachers/t/patch/c/1/0/0", out / "images/commits/000000.json"
    shard.write_bytes(shard.read_bytes()[:-1])
    images.unlink()
    again = (*arguments(original.parent), "-o", out)
    assert_refused(kpu("extract", *again), "images/commits/000000.json: is missing", f"repair {out}`", code=1)
    status = kpu("status", out)
    assert status.exit_code == 1
    assert "the images of 1 unit are not committed" in status.stdout

    planned = kpu("repair", "--dry-run", out, "--json")
    assert planned.exit_code == 1
    records = ["teachers/t/commits/000000.json", "teachers/t/commits/000001.json", "teachers/u/commits/000000.json"]
    assert json.loads(planned.stdout) == {"withdrawn": records, "left": []}
    done = kpu("repair", out)
    assert done.exit_code == 1
    assert [line for line in done.stdout.splitlines() if line.startswith("withdrawn")] == [
        f"withdrawn: {record}" for record in records
    ]
    assert "nothing to withdraw" in kpu("repair", out).stdout
    assert kpu("extract", *again).exit_code == 0
    assert kpu("verify", out).exit_code == 0
    assert contents(out).items() >= before.items()


def test_gc_frees_what_dead_runs_left_and_nothing_else(out: Path) -> None:
    before = snapshot(out)
    for folder in ("20200101T000000Z-abcdef", "quarantine/x"):
        (out / ".tmp" / folder).mkdir(parents=True)
        (out / ".tmp" / folder / "left").write_bytes(b"x" * 1000)
    assert kpu_json("gc", out) == {"freed_bytes": 2000}
    assert [path.name for path in (out / ".tmp").iterdir() if path.is_dir()] == []
    assert {name: value for name, value in snapshot(out).items() if ".tmp" not in name} == {
        name: value for name, value in before.items() if ".tmp" not in name
    }
    assert "freed 0 B" in kpu("gc", out).stdout


def test_nothing_to_retry(original: Path) -> None:
    assert "nothing to retry" in kpu("retry-failed", original).stdout
    assert kpu_json("retry-failed", original) == {"retried_units": 0, "runs": []}


def test_a_retry_at_a_file_url(out: Path) -> None:
    (out / "teachers/t/commits/000001.json").unlink()
    (run,) = (out / "runs").glob("*.json")
    failed = [{"teacher": "t", "unit": 1, "reason": "it broke"}]
    run.write_text(json.dumps({**json.loads(run.read_text()), "failed": failed}))
    done = kpu_json("retry-failed", f"file://{out}")
    assert (done["retried_units"], [retried["complete"] for retried in done["runs"]]) == (1, [True])
    assert done["runs"][0]["out"] == str(out)


@pytest.mark.parametrize("command", COMMANDS)
def test_rejects_other_places_without_touching_them(command: str, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 1)
    before = snapshot(tmp_path)
    for path in (folder, folder / "000.png", tmp_path / "none"):
        assert_refused(kpu(command, path), str(path), "expected", "found", "check the path")
    assert snapshot(tmp_path) == before


def test_a_cache_whose_planning_was_interrupted(out: Path) -> None:
    (out / "plan.json").unlink()
    shutil.rmtree(out / "runs")
    assert not kpu_json("status", out)["complete"]
    assert kpu("gc", out).exit_code == 0
    assert kpu("verify", out).exit_code == 1


def test_a_damaged_plan_is_named(out: Path) -> None:
    plan = out / "plan.json"
    plan.write_bytes(plan.read_bytes()[:-20])
    assert_refused(kpu("status", out), "plan.json", code=1)
    assert kpu("verify", out).exit_code == 1


def test_summary_of_an_extraction_as_json(original: Path, tmp_path: Path) -> None:
    cache = open_cache(original)
    teacher = cache.teachers["t"].spec.model
    result = kpu("extract", cache.plan.source.root, "-t", f"t={teacher}", "-o", tmp_path / "o.kpu", "--json")
    summary = json.loads(result.stdout)
    assert summary["complete"] and summary["failed"] == []
    assert (summary["rows"], summary["masked"], summary["remaining_units"]) == (71, 1, 0)
    assert summary["rows_per_second"] == pytest.approx(71 / summary["seconds"], rel=1e-3)
    assert "extract: 71 of 71 rows on 1 worker" in result.stderr
    assert json.loads((tmp_path / "o.kpu/runs" / f"{summary['run']}.json").read_text())["status"] == "complete"


def test_help_names_every_command() -> None:
    names = {"extract", "export", "import", *COMMANDS}
    assert set(typer.main.get_command(app).commands) == names
    assert names <= {line.strip("│ ").partition(" ")[0] for line in kpu("--help").stdout.splitlines()}
    assert kpu("extract", "--nope").exit_code == 2
    assert kpu("verify").exit_code == 2
