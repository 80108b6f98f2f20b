"""The plan of a cache: the size of units, the rows of views, and whether a listing is still what was planned."""

from pathlib import Path

import pytest

from kpu.errors import MismatchError, SourceError
from kpu.format.plan import DEFAULT_MAX_PIXELS, Decoding, Plan
from kpu.format.teacher import CodecSpec, InputSpec, OutputSpec, TeacherSpec
from kpu.records.plan import load_plan
from kpu.records.samples import Samples
from kpu.sources import ImageSource, open_source
from kpu.storage.leases import lease
from kpu.storage.open import open_storage
from pipeline.config import ExtractConfig, validate_config
from pipeline.planning import check_settings, choose_threads, choose_unit_rows, open_data, plan_cache
from pipeline.run.observers import Observer, Silent
from pipeline.sections import ExecutorConfig
from tests.support.builders import Hooked
from tests.support.sources import pack
from tests.support.toys import write_images


class Listener(Silent):
    """Remembers warnings and what it is told of phases."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.phases: list[str] = []

    def phase(self, name: str, detail: str) -> None:
        self.phases.append(f"{name}: {detail}")

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def teacher(shape: tuple[int, ...], codec: str = "uniform") -> TeacherSpec:
    grid = (shape[0], 1) if len(shape) == 2 else None
    return TeacherSpec(
        name="t",
        model="timm:x",
        weights=None,
        weights_digest="0",
        input=InputSpec(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1)),
        precision="fp32",
        outputs=(OutputSpec(name="patch" if grid else "global", shape=shape, grid=grid),),
        codec=CodecSpec(name=codec),
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 10)


def configure(images: Path, **values: object) -> ExtractConfig:
    teachers = {"t": {"model": "timm:x"}}
    document = {"data": {"source": str(images)}, "out": str(images.parent / "o.kpu"), "teachers": teachers, **values}
    return validate_config(document, "test")


def plan(
    config: ExtractConfig, run: str = "run", observer: Observer | None = None, source: ImageSource | None = None
) -> Plan:
    storage = open_storage(config.out, create=True)
    with lease(storage, run):
        return plan_cache(
            storage, source or open_source(config.data), config, [teacher((8,))], 1, run, observer or Silent()
        )


@pytest.mark.parametrize(
    ("rows", "shape", "codec", "unit_rows"),
    [
        (10**9, (8,), "uniform", 4096),  # as large as units get
        (100, (8,), "uniform", 64),  # as small
        (16 * 1024, (8,), "uniform", 1024),  # some 16 units
        (10**9, (256, 1024), "uniform", 256),  # shards of 64 MB
        (10**9, (256, 1024), "fp32", 64),
        (10**9, (4096, 4096), "uniform", 64),  # never below, whatever the shard
    ],
)
def test_auto_unit_rows(rows: int, shape: tuple[int, ...], codec: str, unit_rows: int) -> None:
    assert choose_unit_rows(rows, [teacher(shape, codec)]) == unit_rows


def test_threads_are_those_of_the_plan(images: Path) -> None:
    standing, listener = plan(configure(images)), Listener()
    assert choose_threads(ExecutorConfig(), None, listener) is None
    assert choose_threads(ExecutorConfig(), standing, listener) == 1
    assert choose_threads(ExecutorConfig(threads=3), None, listener) == 3
    assert listener.warnings == []
    assert choose_threads(ExecutorConfig(threads=3), standing, listener) == 3
    assert "executor.threads: this cache was begun with 1 threads" in listener.warnings[0]


def test_the_same_listing_is_the_same_plan(images: Path) -> None:
    config = configure(images)
    first = plan(config)
    assert plan(config, "again") == first == load_plan(open_storage(config.out))
    assert (first.samples, first.views, first.rows, first.unit_rows, first.threads) == (10, 1, 10, 64, 1)


def test_units_that_another_driver_chose_at_the_same_time_are_taken_over(images: Path) -> None:
    config = configure(images)
    storage = open_storage(config.out, create=True)

    def other() -> None:
        plan(configure(images, unit_rows=128), "other")

    with lease(storage, "run"):
        late = Hooked(storage, "publish", "plan.json", other)
        found = plan_cache(late, open_source(config.data), config, [teacher((8,))], 1, "run", Silent())
    assert found == load_plan(storage)
    assert found.unit_rows == 128
    assert Samples(storage, found).to_table().num_rows == 10
    with pytest.raises(MismatchError, match=r"unit_rows: the cache at .* was made with 128, found 64"):
        plan(configure(images, unit_rows=64), "last")


def test_views_are_rows_side_by_side(images: Path) -> None:
    config = configure(images, views=3, seed=5)
    made = plan(config)
    table = Samples(open_storage(config.out), made).to_table()
    assert made.rows == table.num_rows == 30
    assert table["key"].to_pylist()[:4] == ["000.png"] * 3 + ["001.png"]
    assert table["view"].to_pylist()[:4] == [0, 1, 2, 0]
    draws = table["draws"].to_pylist()
    assert len({tuple(row) for row in draws}) == 30
    single = plan(configure(images, out=str(images.parent / "other.kpu"), views=2, seed=5))
    other = Samples(open_storage(images.parent / "other.kpu"), single).to_table()["draws"].to_pylist()
    assert other[:2] == draws[:2]  # a view does not depend on how many there are


def test_the_row_that_differs_is_named(images: Path) -> None:
    config = configure(images)
    plan(config)
    (images / "004.png").rename(images / "0045.png")
    with pytest.raises(MismatchError, match=r"row 4: expected '004.png', found '0045.png'; restore"):
        plan(config, "again")


def test_the_last_rows_may_be_missing_in_whole_parts(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index in range(2 * 64 * 64):
        (images / f"{index:05d}.png").touch()
    config = configure(images, unit_rows=64)
    plan(config)
    for index in range(64 * 64, 2 * 64 * 64):
        (images / f"{index:05d}.png").unlink()
    with pytest.raises(
        MismatchError, match=r"expected 8,192 rows, found 4,096; row 4096: expected '04096.png', found no"
    ):
        plan(config, "again")


def test_an_empty_source(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(SourceError, match="nothing to extract"):
        plan(configure(tmp_path / "images"))


def test_what_the_listing_left_out_is_said_in_one_line(images: Path) -> None:
    (images / "b.psd").touch()
    (images / "readme").touch()
    for run in ("first", "again"):
        listener = Listener()
        plan(configure(images), run, listener)
        assert listener.phases == ["plan: left out: 1 with the ending .psd (b.psd), 1 without an ending (readme)"]
        assert listener.warnings == []


def test_a_new_plan_records_its_limit_of_pixels(images: Path) -> None:
    config = configure(images)
    made = plan(config, source=open_data(config.data, None))
    assert made.source.decoding == Decoding(max_pixels=DEFAULT_MAX_PIXELS)
    other = configure(images, data={"source": str(images), "max_pixels": 1000})
    with pytest.raises(MismatchError, match=r"data\.max_pixels: .* was made with 134217728, found 1000"):
        check_settings(made, open_data(other.data, made), other)
    deeper = configure(images, data={"source": str(images), "bits": 12})
    with pytest.raises(MismatchError, match=r"data\.bits: .* was made with None, found 12"):
        check_settings(made, open_data(deeper.data, made), deeper)


def test_a_plan_of_an_earlier_release_keeps_its_limit(images: Path) -> None:
    """Its document has no such key, and must not get one: its digest is in every commit record."""
    config = configure(images)
    document = plan(config, source=open_data(config.data, None)).model_dump(mode="json")
    del document["source"]["decoding"]
    old = Plan.model_validate(document)
    assert old.model_dump(mode="json") == document
    source = open_data(config.data, old)
    assert source.spec.decoding == Decoding() == Decoding(max_pixels=178_956_970)
    check_settings(old, source, config)


def earlier(config: ExtractConfig) -> ImageSource:
    """The source as earlier releases listed it."""
    found = open_source(config.data).earlier
    assert found is not None
    return found


def test_a_cache_of_an_earlier_release_keeps_its_rows_and_says_so(tmp_path: Path) -> None:
    """Its labels were lost where hidden members lie between those of a sample."""
    tar = pack(tmp_path / "s.tar", [("0.cls", b"3"), ("._0.jpg", b""), ("0.jpg", b"image")])
    config, listener = configure(tar, out=str(tmp_path / "o.kpu")), Listener()
    first = plan(config, "first", source=earlier(config))
    storage = open_storage(config.out)
    assert Samples(storage, first).to_table()["label"].to_pylist() == [None]
    assert plan(config, "again", listener) == first
    assert len(listener.warnings) == 1
    assert "begun by an earlier release and keeps the rows and labels" in listener.warnings[0]
    assert "row 0: expected label None for 's/0', found 3; extract to another `out`" in listener.warnings[0]
    pack(tar, [("0.cls", b"3"), ("._0.jpg", b""), ("1.jpg", b"image")])
    with pytest.raises(MismatchError, match=r"made from other data: row 0: expected 's/0', found 's/1'"):
        plan(config, "last", listener)


def test_a_cache_of_an_earlier_release_goes_on_where_the_listing_is_refused_today(tmp_path: Path) -> None:
    members = [("0.jpg", b"m"), ("1.jpg", b"1"), ("1.cls", b"1"), ("0.cls", b"4"), ("1.cls", b"2")]
    tar = pack(tmp_path / "s.tar", members)
    config, listener = configure(tar, out=str(tmp_path / "o.kpu")), Listener()
    first = plan(config, "first", source=earlier(config))
    assert (first.rows, plan(config, "again", listener)) == (2, first)
    assert "today the same source gives others: " in listener.warnings[0]
    assert "sample '1': expected one label, found 1 and 2" in listener.warnings[0]
    with pytest.raises(SourceError, match="sample '1': expected one label"):
        plan(configure(tar, out=str(tmp_path / "new.kpu")), "new")
