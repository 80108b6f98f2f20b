"""`bench`: every output measured, codecs in their order of precision, nothing changed."""

import json
from pathlib import Path

import pytest

from kpu.tools.bench import bench
from tests.support.builders import UNIT_ROWS, build
from tests.support.toys import assert_refused, kpu, kpu_json, snapshot

OUTPUTS = [("alpha", "global"), ("alpha", "patch"), ("beta", "global"), ("beta", "layer6.patch")]


@pytest.mark.parametrize("codec", ["fp32", "uniform", "rotated", "uniform in tars"])
def test_every_output_is_measured_and_nothing_changes(tmp_path: Path, codec: str) -> None:
    path = build(tmp_path / "c.kpu", codec=codec).path
    before = snapshot(path)
    result = kpu_json("bench", path, "--rows", 2 * UNIT_ROWS)
    assert snapshot(path) == before
    assert set(result) == {"path", "rows", "readings", "codecs"}
    assert [(r["teacher"], r["output"]) for r in result["readings"]] == OUTPUTS
    for reading in result["readings"]:
        assert reading["stored_bytes"] > 0
        for kind in ("random", "windowed", "raw", "copy"):
            assert reading[kind]["rows_per_second"] > 0
            assert reading[kind]["bytes_per_second"] > 0
    assert len(result["codecs"]) == 11 * len(OUTPUTS)
    assert {tried["grid"] for tried in result["codecs"]} == {None if codec == "fp32" else 0.05}


def test_codecs_cost_what_they_promise(tmp_path: Path) -> None:
    path = build(tmp_path / "c.kpu", codec="fp32").path
    tried = [t for t in bench(str(path), teachers=["beta"]).codecs if t.output == "layer6.patch"]
    assert [(t.codec, t.step) for t in tried] == [
        *((name, step) for name in ("uniform", "rotated") for step in (0.02, 0.05, 0.1, 0.2)),
        *((name, None) for name in ("fp16", "bf16", "fp32")),
    ]
    for t in tried[:8]:
        assert t.step is not None and 0 < t.rmse <= t.worst <= t.step / 2
    for four in (tried[:4], tried[4:8]):
        assert four[0].rmse < four[1].rmse < four[2].rmse < four[3].rmse
    exact = tried[-1]
    assert (exact.rmse, exact.worst) == (0, 0)
    assert exact.cosine == pytest.approx(1)
    assert exact.of_fp16 > tried[8].of_fp16 >= 1


def test_text_names_limits_and_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = build(tmp_path / "c.kpu").path
    text = kpu("bench", path, "-t", "alpha").stdout
    assert "memory copy" in text and "uniform 0.05" in text
    assert "alpha: these features lie on a grid of step 0.05 already" in text
    assert "beta" not in text
    lossless = build(tmp_path / "lossless.kpu", codec="fp16").path
    assert "on a grid" not in kpu("bench", lossless).stdout


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    path = build(tmp_path / "c.kpu").path
    assert_refused(kpu("bench", path, "-t", "gamma"), "gamma", "expected one of", "alpha")
    assert_refused(kpu("bench", tmp_path / "none"), "none", "expected", "check the path")
    for record in Path(path).glob("teachers/*/commits/*.json"):
        record.unlink()
    assert_refused(kpu("bench", path), "committed unit", "found none")


def test_units_that_are_missing_are_left_out(tmp_path: Path) -> None:
    path = build(tmp_path / "c.kpu").path
    (Path(path) / "teachers/alpha/commits/000001.json").unlink()
    result = json.loads(kpu("bench", path, "-t", "alpha", "--json").stdout)
    assert len(result["readings"]) == 2
