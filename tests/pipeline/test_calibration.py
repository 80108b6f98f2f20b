"""Which rows calibration looks at."""

from pathlib import Path
from threading import Event
from typing import Any, Literal

import numpy as np
import pytest

from kpu import open_cache
from kpu.errors import ConfigError
from kpu.format.codecs import calibrated
from kpu.format.plan import Plan, SourceSpec
from kpu.format.statistics import Accumulator
from kpu.format.teacher import CodecSpec, InputSpec, OutputSpec, TeacherSpec
from pipeline import calibration
from pipeline.calibration import check_range, choose_rows, thin_calibration, wanted_rows
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.run.observers import Silent
from pipeline.worker.engine import Engine
from tests.support.toys import write_images, write_teacher

PINNED = [23434, 34058, 67044]


def config(**values: Any) -> ExtractConfig:
    teachers = {"base": {"model": "timm:any"}}
    return ExtractConfig.model_validate({"data": {"source": "x"}, "out": "o", "teachers": teachers, **values})


def plan(rows: int, seed: int = 0) -> Plan:
    return Plan(
        source=SourceSpec(kind="folder", root="/"),
        fingerprint="",
        classes=None,
        samples=rows,
        views=1,
        seed=seed,
        unit_rows=64,
        threads=1,
        samples_digests=(),
        metadata={},
    )


def teacher(channels: int) -> TeacherSpec:
    return TeacherSpec(
        name="base",
        model="timm:any",
        weights=None,
        weights_digest="",
        input=InputSpec(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1)),
        precision="fp32",
        outputs=(
            OutputSpec(name="global", shape=(channels,)),
            OutputSpec(name="patch", shape=(4, 2 * channels), grid=(2, 2)),
        ),
        codec=CodecSpec(),
    )


@pytest.mark.parametrize(
    ("codec", "channels", "asked", "expected"),
    [
        ("uniform", 32, "auto", 2048),
        ("uniform", 1280, "auto", 2048),
        ("fp16", 1280, "auto", 2048),
        ("rotated", 32, "auto", 2048),
        ("rotated", 1280, "auto", 25600),  # patch has twice the channels
        ("rotated", 1280, 33, 33),
        ("uniform", 1280, 33, 33),
    ],
)
def test_only_a_covariance_needs_rows_for_each_channel(codec: Any, channels: int, asked: int, expected: int) -> None:
    spec = teacher(channels).model_copy(update={"codec": CodecSpec(name=codec)})
    assert wanted_rows(spec, config(calibration_rows=asked)) == expected


@pytest.mark.parametrize(
    ("rows", "wanted", "expected"), [(10**9, 2048, 2048), (1000, 2048, 1000), (5, 33, 5), (1, 9, 1)]
)
def test_rows_are_sorted_distinct_and_as_many_as_needed(rows: int, wanted: int, expected: int) -> None:
    chosen = choose_rows(plan(rows), wanted)
    assert chosen.dtype == np.int64
    assert len(chosen) == expected
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < rows


def test_rows_cover_the_plan_evenly_and_depend_on_the_seed() -> None:
    chosen = choose_rows(plan(100_000), 1000)
    assert np.bincount(chosen // 10_000).tolist() == [100] * 10
    assert np.array_equal(chosen, choose_rows(plan(100_000), 1000))
    assert not np.array_equal(chosen, choose_rows(plan(100_000, seed=1), 1000))
    assert choose_rows(plan(100_000, seed=2**63 - 1), 3).tolist() == PINNED


@pytest.mark.parametrize(("name", "least"), [("uniform", 3.3 / 32767), ("rotated", 2 * 3.3 / 16383)])
def test_a_step_too_small_for_usual_values_is_refused(name: Literal["uniform", "rotated"], least: float) -> None:
    """Under `rotated` they lie further out where channels go together: here all four are the same."""
    total = Accumulator(4)
    total.update(np.random.default_rng(0).standard_normal((500, 1)).repeat(4, 1))
    for step, fits in ((least * 1.1, True), (least * 0.9, False), (1e-6, False)):
        codec = CodecSpec(name=name, step=step)
        spec, statistics = teacher(4).model_copy(update={"codec": codec}), {"global": calibrated(total, codec)}
        if fits:
            check_range(spec, statistics)
            continue
        with pytest.raises(ConfigError, match=r"teacher 'base', output 'global': codec\.step: expected at") as error:
            check_range(spec, statistics)
        advised = str(error.value).partition("at least ")[2].partition(",")[0]
        assert float(advised) == pytest.approx(least, rel=0.05)


def test_too_few_rows_are_told() -> None:
    rotated = teacher(100).model_copy(update={"codec": CodecSpec(name="rotated")})
    assert thin_calibration(rotated, 1000, 10**6) is None
    assert thin_calibration(teacher(100), 2048, 256) is None
    for spec, rows, fewer in ((rotated, 999, "10 for each of the 100 channels"), (teacher(100), 255, "256: ")):
        warning = thin_calibration(spec, rows, 10**6)
        assert warning is not None and warning.endswith("; raise calibration_rows")
        assert (thin_calibration(spec, 2048, rows) or "").endswith("; use more images")
        assert f"teacher 'base': calibrated on {rows} rows, fewer than {fewer}" in warning


def test_teachers_are_calibrated_on_the_rows_that_each_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a cache keeps what it was begun with, whatever later runs would take."""

    class Seen(Silent):
        def __init__(self) -> None:
            self.phases: list[str] = []

        def phase(self, name: str, detail: str) -> None:
            self.phases += [detail] * (name == "calibrate")

    source, images = write_teacher(tmp_path), write_images(tmp_path / "images", 70)
    given = {"codec": {"name": "rotated"}, "model": f"{source}:toy"}
    seen, out = Seen(), tmp_path / "o.kpu"
    values = {"data": {"source": str(images)}, "out": str(out), "unit_rows": 64, "calibration_rows": 40}
    begun = ExtractConfig.model_validate({**values, "teachers": {"a": given, "b": {"model": f"{source}:wider"}}})
    assert not extract(begun, seen, frozenset({0})).complete
    published = (out / "teachers/a/stats.safetensors").read_bytes()
    assert extract(begun.model_copy(update={"calibration_rows": "auto"}), seen).complete
    assert (out / "teachers/a/stats.safetensors").read_bytes() == published
    assert seen.phases == ["a, b on 40 rows"]
    fresh = begun.model_copy(update={"out": str(tmp_path / "p.kpu"), "calibration_rows": "auto"})
    monkeypatch.setattr(calibration, "USUAL_ROWS", 30)
    assert extract(fresh, seen).complete
    assert seen.phases[1:] == ["b on 30 rows", "a on 60 rows, 10 for each channel, as codec rotated needs"]
    assert {o: s.count for o, s in open_cache(tmp_path / "p.kpu").teachers["a"].statistics.items()}["global"] == 60


def test_a_slow_calibration_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the worker's own count, while it works."""
    images = write_images(tmp_path / "images", 6)
    told: list[tuple[str, int, int]] = []
    more = Event()

    class Listening(Silent):
        def progress(self, phase: str, total: int, done: int) -> None:
            told.append((phase, total, done))
            more.set()

    accumulate = Engine.accumulate

    def slow(self: Engine, table: Any, names: Any, done: Any) -> Any:
        def hold(rows: int) -> None:
            done(rows)
            more.clear()
            assert more.wait(60)

        return accumulate(self, table, names, hold)

    monkeypatch.setattr(Engine, "accumulate", slow)
    monkeypatch.setattr("pipeline.executors.inline.TELL_EVERY_SECONDS", 0.01)
    teacher = {"model": f"{write_teacher(tmp_path)}:toy"}
    small = ExtractConfig.model_validate(
        {
            "data": {"source": str(images)},
            "out": str(tmp_path / "o.kpu"),
            "teachers": {"t": teacher},
            "executor": {"batch_size": 4},
        }
    )
    assert extract(small, Listening()).complete
    assert {("calibrate", 6, 4), ("calibrate", 6, 6)} <= set(told)
