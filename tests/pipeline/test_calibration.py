"""Which rows calibration looks at."""

from typing import Literal

import numpy as np
import pytest

from cache.codecs import calibrated
from cache.errors import ConfigError
from cache.spec import CodecSpec, InputSpec, OutputSpec, Plan, SourceSpec, TeacherSpec
from cache.statistics import Accumulator
from pipeline.calibration import check_range, choose_rows, thin_calibration

PINNED = [23434, 34058, 67044]


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
    ("rows", "widest", "asked", "expected"),
    [
        (10**9, 64, "auto", 2048),
        (10**9, 768, "auto", 7680),
        (1000, 768, "auto", 1000),
        (10**9, 768, 33, 33),
        (5, 768, 33, 5),
        (1, 768, "auto", 1),
    ],
)
def test_rows_are_sorted_distinct_and_as_many_as_needed(rows: int, widest: int, asked: int, expected: int) -> None:
    chosen = choose_rows(plan(rows), widest, asked)
    assert chosen.dtype == np.int64
    assert len(chosen) == expected
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < rows


def test_rows_cover_the_plan_evenly_and_depend_on_the_seed() -> None:
    chosen = choose_rows(plan(100_000), 64, 1000)
    assert np.bincount(chosen // 10_000).tolist() == [100] * 10
    assert np.array_equal(chosen, choose_rows(plan(100_000), 64, 1000))
    assert not np.array_equal(chosen, choose_rows(plan(100_000, seed=1), 64, 1000))
    assert choose_rows(plan(100_000, seed=2**63 - 1), 64, 3).tolist() == PINNED


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
    assert thin_calibration(teacher(100), 1000) is None
    warning = thin_calibration(teacher(100), 999)
    assert warning is not None
    assert "'base'" in warning
    assert "999 rows" in warning
    assert "100 channels" in warning
