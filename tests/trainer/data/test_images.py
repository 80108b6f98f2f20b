"""The images of a cache's rows, read again: the pixels that extraction saw, or an error that says what is wrong."""

import io
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from kpu import Cache, open_cache
from kpu.errors import ConfigError, MismatchError, SourceError
from kpu.format.commits import ImageStatus
from kpu.format.teacher import InputSpec
from kpu.pixels.refused import Refused
from kpu.pixels.resize import geometry
from kpu.sources import source_reader
from pipeline.run.reports import Stopwatch
from pipeline.sections import InputConfig, TeacherConfig
from pipeline.teachers import build_teacher
from pipeline.worker.loading import ImageLoader
from tests.support.toys import kpu, noise, write_teacher
from trainer.data.images import ImageReader, normalise

COUNT = 70  # images, of two units at least
BROKEN = 5  # the place of the one that cannot be decoded
KINDS = ("folder", "tar", "parquet")
SQUASHED = InputSpec(size=(6, 9), mean=(0.5,) * 3, std=(0.25,) * 3, crop=0.75, crop_mode="squash")


def encoded(place: int) -> bytes:
    """One image: most noise of a size of its own, one transparent, one turned by its EXIF, one broken."""
    sink = io.BytesIO()
    image = noise(place, (8 + place % 5, 9 + place % 7))
    if place == 1:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[0x0112] = 6 if place == 2 else 1
    image.save(sink, "PNG", exif=exif)
    return sink.getvalue()[:60] if place == BROKEN else sink.getvalue()


def write_folder(folder: Path) -> Path:
    for place in range(COUNT):
        (folder / f"{place:03d}.png").write_bytes(encoded(place))
    return folder


def write_tars(folder: Path) -> Path:
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for place in range(number, COUNT, 2):
                data = encoded(place)
                info = tarfile.TarInfo(f"{place:03d}.png")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def write_parquet(folder: Path) -> Path:
    images = [{"bytes": encoded(place), "path": None} for place in range(COUNT)]
    pq.write_table(pa.table({"image": images}), folder / "all.parquet", row_group_size=32)
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {"folder": write_folder, "tar": write_tars, "parquet": write_parquet}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Cache]:
    """Gives a cache of a kind of source and a number of views; made once, with its images beside it."""
    made: dict[tuple[str, int], Cache] = {}

    def get(kind: str, views: int) -> Cache:
        if (kind, views) not in made:
            place = tmp_path_factory.mktemp(kind)
            (place / "images").mkdir()
            model = write_teacher(place)
            images, out = WRITERS[kind](place / "images"), place / "o.kpu"
            options = ["--set", f"views={views}", "--set", "unit_rows=64", "--set", "executor.threads=1"]
            result = kpu("extract", images, "-t", f"toy={model}:toy", "-o", out, *options)
            assert result.exit_code == 0, result.output
            made[kind, views] = open_cache(out)
        return made[kind, views]

    return get


@pytest.fixture
def moved(extracted: Callable[[str, int], Cache], tmp_path: Path) -> tuple[Cache, Path]:
    """The cache of a folder, and a copy of its images to damage at will."""
    (tmp_path / "images").mkdir()
    return extracted("folder", 1), write_folder(tmp_path / "images")


def toy_input(cache: Cache) -> InputSpec:
    return cache.teachers["toy"].spec.input


def extraction_pixels(cache: Cache, spec: InputSpec) -> np.ndarray[Any, Any]:
    """What extraction computes with, of all rows: uint8 [rows, H, W, 3]."""
    with ThreadPoolExecutor(1) as pool:
        loader = ImageLoader(source_reader(cache.plan.source), pool, 1, 0)
        batches = loader.batches(cache.samples.to_table(), 16, [geometry(spec)], Stopwatch())
        return np.concatenate([batch.pixels[geometry(spec)] for batch in batches])


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_extraction(extracted: Callable[[str, int], Cache], kind: str, views: int) -> None:
    cache = extracted(kind, views)
    rows = np.random.default_rng(0).permutation(cache.rows)
    assert cache.rows == COUNT * views
    for spec in (toy_input(cache), SQUASHED):
        expected = extraction_pixels(cache, spec)
        pixels, valid = ImageReader(cache, spec, root=None, threads=2).load(rows)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, expected[rows])
        np.testing.assert_array_equal(valid, cache.valid(rows))
        assert np.count_nonzero(~valid) == views
        assert not pixels[~valid].any()
        assert pixels[valid].reshape(valid.sum(), -1).any(1).all()


def test_views_of_a_sample_differ(extracted: Callable[[str, int], Cache]) -> None:
    cache = extracted("folder", 3)
    pixels, _ = ImageReader(cache, toy_input(cache), root=None, threads=1).load(np.arange(3))
    assert (pixels[0] != pixels[1]).any()
    assert (pixels[1] != pixels[2]).any()


def test_rows_may_repeat_or_be_none(extracted: Callable[[str, int], Cache]) -> None:
    cache = extracted("tar", 3)
    reader = ImageReader(cache, toy_input(cache), root=None, threads=1)
    whole, valid = reader.load(np.arange(cache.rows))
    rows = np.array([7, 2, 7, 209, 0, 2])
    np.testing.assert_array_equal(reader.load(rows)[0], whole[rows])
    assert reader.load(np.empty(0, np.int64))[0].shape == (0, 8, 8, 3)
    masked = np.flatnonzero(~valid)
    assert not reader.load(masked)[1].any()


def test_several_threads_read_at_once(extracted: Callable[[str, int], Cache]) -> None:
    for kind in KINDS:
        cache = extracted(kind, 3)
        reader = ImageReader(cache, toy_input(cache), root=None, threads=2)
        expected, _ = ImageReader(cache, toy_input(cache), root=None, threads=1).load(np.arange(cache.rows))
        picks = [np.random.default_rng(seed).integers(0, cache.rows, 50) for seed in range(12)]
        with ThreadPoolExecutor(4) as pool:
            for rows, (pixels, _) in zip(picks, pool.map(reader.load, picks), strict=True):
                np.testing.assert_array_equal(pixels, expected[rows])


def test_images_that_moved_as_a_whole_are_read_where_they_are(moved: tuple[Cache, Path]) -> None:
    cache, images = moved
    away = Path(cache.plan.source.root).rename(images.parent / "away")
    try:
        with pytest.raises(ConfigError, match=r"images\.root: expected the folder .* found no folder .*/images;"):
            ImageReader(cache, toy_input(cache), root=None, threads=1)
        pixels, _ = ImageReader(cache, toy_input(cache), root=str(images), threads=1).load(np.arange(cache.rows))
    finally:
        away.rename(cache.plan.source.root)
    np.testing.assert_array_equal(pixels, extraction_pixels(cache, toy_input(cache)))


def test_a_root_that_is_not_there(moved: tuple[Cache, Path]) -> None:
    cache, images = moved
    with pytest.raises(ConfigError, match=r"images\.root: .* found no folder .*/none; set images\.root"):
        ImageReader(cache, toy_input(cache), root=str(images / "none"), threads=1)
    with pytest.raises(ConfigError, match=r"images\.root: nosuch://images: expected a local path or a URL"):
        ImageReader(cache, toy_input(cache), root="nosuch://images", threads=1)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_image_that_changed_is_named(moved: tuple[Cache, Path], threads: int) -> None:
    cache, images = moved
    noise(1000).save(images / "003.png")
    reader = ImageReader(cache, toy_input(cache), root=str(images), threads=threads)
    with pytest.raises(MismatchError) as error:
        reader.load(np.arange(10))
    for part in ("'003.png'", str(images / "003.png"), "found other bytes", "restore it", "images.root", cache.path):
        assert part in str(error.value)
    assert reader.load(np.array([2, 4]))[1].all()


def test_an_image_that_is_gone_is_named(moved: tuple[Cache, Path]) -> None:
    cache, images = moved
    (images / "003.png").unlink()
    reader = ImageReader(cache, toy_input(cache), root=str(images), threads=1)
    with pytest.raises(SourceError) as error:
        reader.load(np.arange(10))
    for part in (str(images / "003.png"), "no such file", "set images.root", cache.plan.source.root):
        assert part in str(error.value)


def test_a_masked_image_is_not_needed(moved: tuple[Cache, Path]) -> None:
    cache, images = moved
    (images / f"{BROKEN:03d}.png").unlink()
    pixels, valid = ImageReader(cache, toy_input(cache), root=str(images), threads=1).load(np.arange(10))
    assert np.flatnonzero(~valid).tolist() == [BROKEN]
    assert not pixels[BROKEN].any()


def test_an_image_that_decodes_no_more_is_named(moved: tuple[Cache, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another Pillow, or one without a codec, must not turn rows black in silence."""
    cache, images = moved

    def refuse(*_: object) -> None:
        raise Refused(ImageStatus.TOO_LARGE)

    monkeypatch.setattr("kpu.pixels.decode.open_image", refuse)
    with pytest.raises(MismatchError, match=r"'000\.png'.*expected an image that can be decoded.*TOO_LARGE.*Pillow"):
        ImageReader(cache, toy_input(cache), root=str(images), threads=1).load(np.arange(2))


def test_normalised_as_extraction_does(tmp_path: Path) -> None:
    own = InputConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config = TeacherConfig(model=f"{write_teacher(tmp_path)}:toy", input=own)
    teacher = build_teacher("toy", config, device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    values = normalise(torch.from_numpy(pixels), teacher.input)
    mean, std = (np.reshape(each, (3, 1, 1)) for each in (own.mean, own.std))
    assert (values.dtype, values.shape) == (torch.float32, (4, 3, 8, 8))
    np.testing.assert_allclose(values, (pixels.transpose(0, 3, 1, 2) / 255 - mean) / std, atol=1e-6)
    assert torch.equal(values, teacher._normalise(torch.from_numpy(pixels)))
