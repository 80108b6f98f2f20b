"""Pixels are those of each teacher's own evaluation transform."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torchvision.transforms.functional as reference
from PIL import Image
from torchvision.transforms import InterpolationMode

from kpu.format.teacher import InputSpec
from kpu.pixels import resize
from kpu.pixels.decode import decode_image
from kpu.pixels.resize import geometry, resize_image
from kpu.pixels.views import View
from kpu.sources import open_source, source_reader
from tests.support.sources import Data, listed

SIZES = [(500, 375), (375, 500), (224, 224), (225, 224), (1, 1), (7, 300), (1300, 640), (31, 33), (224, 256)]
CONFIGS = [
    ((224, 224), 0.875, "bicubic"),
    ((224, 224), 0.9, "bicubic"),
    ((224, 224), 1.0, "bicubic"),
    ((224, 224), 0.875, "bilinear"),
    ((518, 518), 1.0, "bicubic"),
    ((224, 224), 0.95, "lanczos"),
    ((64, 64), 0.9, "nearest"),
    ((192, 256), 0.9, "bicubic"),
    ((256, 128), 1.0, "bilinear"),
    ((32, 32), 1.0, "bilinear"),
]


def spec(size: tuple[int, int], crop: float = 1.0, interpolation: str = "bicubic", mode: str = "center") -> InputSpec:
    values: dict[str, Any] = {"size": size, "crop": crop, "interpolation": interpolation, "crop_mode": mode}
    return InputSpec(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), **values)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8))


def by_timm(
    image: Image.Image, size: tuple[int, int], crop: float, interpolation: str, mode: str = "center"
) -> np.ndarray[Any, Any]:
    transform = timm.data.create_transform(
        (3, *size), is_training=False, crop_pct=crop, crop_mode=mode, interpolation=interpolation, normalize=False
    )
    result: np.ndarray[Any, Any] = transform(image).permute(1, 2, 0).numpy()
    return result


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_full_view_is_timm_pixel_for_pixel(config: tuple[tuple[int, int], float, str]) -> None:
    for size in SIZES:
        image = picture(*size)
        found = resize_image(image, spec(*config))
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, by_timm(image, *config), err_msg=f"image of {size}")


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_squash_is_timm_pixel_for_pixel(config: tuple[tuple[int, int], float, str]) -> None:
    for size in SIZES:
        image = picture(*size)
        found = resize_image(image, spec(*config, mode="squash"))
        np.testing.assert_array_equal(found, by_timm(image, *config, mode="squash"), err_msg=f"image of {size}")


def test_centre_is_rounded_as_timm_or_down() -> None:
    # Scaled to 238 x 161, of which 128 columns are cut, and 51 rows: 25.5 above and below.
    image = picture(312, 211)
    whole = spec((161, 238), mode="squash")
    rounded = spec((110, 110), 110 / 161)
    floored = rounded.model_copy(update={"crop_rounding": "floor"})
    np.testing.assert_array_equal(resize_image(image, rounded), resize_image(image, whole)[26:136, 64:174])
    np.testing.assert_array_equal(resize_image(image, floored), resize_image(image, whole)[25:135, 64:174])


def test_blue_may_come_first() -> None:
    image = picture(60, 40)
    reversed_ = spec((24, 24)).model_copy(update={"channels": "bgr"})
    for view in (View(None), View((3, 4, 30, 39), True)):
        found = resize_image(image, reversed_, view)
        np.testing.assert_array_equal(found, resize_image(image, spec((24, 24)), view)[..., ::-1])
        batch = np.zeros((1, 24, 24, 3), np.uint8)
        np.testing.assert_array_equal(resize_image(image, reversed_, view, out=batch[0]), found)


def test_image_is_fitted_and_filled_up_with_the_mean() -> None:
    padded = spec((48, 64), mode="pad").model_copy(update={"mean": (0.0, 0.5, 1.0)})
    for size, fitted in [((200, 50), (64, 16)), ((33, 90), (18, 48)), ((64, 48), (64, 48)), ((1, 900), (1, 48))]:
        image = picture(*size)
        found = resize_image(image, padded)
        width, height = fitted
        expected = np.asarray(image.resize(fitted, Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(found[:height, :width], expected)
        assert (found[height:] == (0, 128, 255)).all()
        assert (found[:, width:] == (0, 128, 255)).all()
        turned = resize_image(image, padded.model_copy(update={"channels": "bgr", "mean": (1.0, 0.5, 0.0)}))
        np.testing.assert_array_equal(turned, found[..., ::-1])
    with pytest.raises(ValueError, match=r"expected crop 1 with crop_mode pad, found 0\.9"):
        spec((48, 64), 0.9, mode="pad")


def test_full_view_is_timm_for_real_models_and_photos(shared_data: Path) -> None:
    source = open_source(Data(str(shared_data / "data/imagenet-sample/sample-000000.tar"), limit=12))
    photos = [decode_image(data) for data in source_reader(source.spec).read(listed(source))]
    for name in (
        "vit_small_patch14_dinov2",
        "vit_base_patch16_clip_224",
        "vit_base_patch16_siglip_224",
        "resnet50.a1_in1k",
    ):
        config = timm.data.resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
        args = (tuple(config["input_size"][1:]), config["crop_pct"], config["interpolation"], config["crop_mode"])
        for photo in photos:
            assert isinstance(photo, Image.Image)
            np.testing.assert_array_equal(resize_image(photo, spec(*args)), by_timm(photo, *args))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_box_is_resized_crop_of_torchvision(interpolation: str) -> None:
    image = picture(500, 375)
    left, upper, right, lower = box = (37, 11, 401, 260)
    modes = {mode.value: mode for mode in InterpolationMode}
    expected = reference.resized_crop(image, upper, left, lower - upper, right - left, [96, 160], modes[interpolation])
    view = spec((96, 160), 0.875, interpolation)
    np.testing.assert_array_equal(resize_image(image, view, View(box)), np.asarray(expected))
    np.testing.assert_array_equal(resize_image(image, view, View(box, True)), np.asarray(reference.hflip(expected)))


def test_image_of_the_right_size_is_passed_through() -> None:
    image = picture(32, 32)
    np.testing.assert_array_equal(resize_image(image, spec((32, 32))), np.asarray(image))
    np.testing.assert_array_equal(resize_image(image, spec((32, 32)), View(None, True)), np.asarray(image)[:, ::-1])


def test_result_is_written_into_a_batch() -> None:
    batch = np.zeros((2, 24, 24, 3), np.uint8)
    image = picture(90, 50)
    found = resize_image(image, geometry(spec((24, 24), 0.9)), out=batch[1])
    assert np.shares_memory(found, batch)
    np.testing.assert_array_equal(batch[1], resize_image(image, spec((24, 24), 0.9)))
    assert not batch[0].any()


def test_teachers_with_equal_geometry_share_it() -> None:
    one = InputSpec(size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.9)
    other = one.model_copy(update={"mean": (0.485, 0.456, 0.406), "std": (0.2, 0.2, 0.2)})
    assert geometry(one) == geometry(other)
    assert len({geometry(s) for s in (one, other, one.model_copy(update={"crop": 0.875}))}) == 2
    for change in ({"interpolation": "bilinear"}, {"crop_rounding": "floor"}, {"channels": "bgr"}):
        assert geometry(one) != geometry(one.model_copy(update=change))


def test_elongated_image_needs_no_elongated_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # Scaled whole, 1 x 1,000,000 pixels would become 224 x 224,000,000: 200 GB.
    image = Image.new("RGB", (1, 1_000_000), (5, 6, 7))
    assert (resize_image(image, spec((224, 224))) == [5, 6, 7]).all()
    # The other way of scaling is used for nothing else, and differs by rounding alone.
    photo = picture(300, 40)
    usual = resize_image(photo, spec((64, 64), 0.9)).astype(int)
    monkeypatch.setattr(resize, "MAX_SCALED_PIXELS", 0)
    assert np.abs(resize_image(photo, spec((64, 64), 0.9)) - usual).max() <= 1
