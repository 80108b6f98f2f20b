"""`--dry-run`: an estimate that agrees with what the extraction then does, and writes nothing."""

from pathlib import Path

import pytest

from tests.support.toys import kpu, kpu_json, snapshot, write_images, write_teacher

KEYS = {
    "rows", "rows_left", "units", "unit_rows", "workers", "bytes_per_row", "total_bytes", "largest_shard_bytes",
    "peak_memory_bytes", "stage_rates", "bottleneck", "rows_per_second", "calibration_rows", "seconds", "gpu_hours",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dry-run")
    write_images(place / "images", 300)
    write_teacher(place)
    return place


def arguments(place: Path, out: Path, *factories: str) -> list[object]:
    teachers = [text for name in factories for text in ("-t", f"{name}=torch:{place}/toy.py:{name}")]
    return [place / "images", *teachers, "-o", out]


def test_an_estimate_agrees_with_the_extraction(place: Path, tmp_path: Path) -> None:
    given = arguments(place, tmp_path / "o.kpu", "toy", "wider")
    estimate = kpu_json("extract", *given, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    assert set(estimate) == KEYS
    assert (estimate["rows"], estimate["rows_left"], estimate["calibration_rows"]) == (300, 300, 300)
    assert (estimate["units"], estimate["unit_rows"], estimate["workers"]) == (5, 64, 1)
    assert {"read", "decode", "forward", "quantise", "encode"} <= estimate["stage_rates"].keys()
    assert estimate["stage_rates"][estimate["bottleneck"]] == min(estimate["stage_rates"].values())
    assert estimate["seconds"] > 300 / estimate["rows_per_second"]
    assert estimate["peak_memory_bytes"] > 1e8

    assert kpu("extract", *given).exit_code == 0
    status = kpu_json("status", tmp_path / "o.kpu")
    for name, teacher in status["teachers"].items():
        assert sum(estimate["bytes_per_row"][name].values()) == pytest.approx(teacher["bytes"] / 300, rel=0.1)
    assert estimate["total_bytes"] == pytest.approx(sum(t["bytes"] for t in status["teachers"].values()), rel=0.1)


def test_what_stands_is_left_out(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.kpu"
    assert kpu("extract", *arguments(place, out, "toy")).exit_code == 0
    (out / "teachers/toy/commits/000004.json").unlink()
    before = snapshot(tmp_path)
    left = kpu_json("extract", *arguments(place, out, "toy"), "--dry-run")
    assert (left["rows"], left["rows_left"], left["calibration_rows"]) == (300, 44, 0)
    added = kpu_json("extract", *arguments(place, out, "toy", "wider"), "--dry-run")
    assert (added["rows_left"], added["calibration_rows"]) == (300, 300)
    assert snapshot(tmp_path) == before
    assert kpu("extract", *arguments(place, out, "toy")).exit_code == 0
    done = kpu_json("extract", *arguments(place, out, "toy"), "--dry-run")
    assert (done["rows_left"], done["total_bytes"], done["seconds"], done["calibration_rows"]) == (0, 0, 0, 0)
    only = kpu_json("extract", *arguments(place, out, "toy", "wider"), "--dry-run")
    assert list(only["bytes_per_row"]) == ["wider"]


def test_an_estimate_for_people(place: Path, tmp_path: Path) -> None:
    text = kpu("extract", *arguments(place, tmp_path / "o.kpu", "toy"), "--dry-run").stdout
    assert "300 rows, 5 units of 64; the largest shard about" in text
    for wanted in (
        "bytes/row",
        "size of all rows",
        "(bottleneck)",
        "total size",
        "peak memory",
        "rows/s on 1 worker",
        "GPU-hours",
    ):
        assert wanted in text
