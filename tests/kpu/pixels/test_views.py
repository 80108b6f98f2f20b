"""View draws are a pure function of (seed, key, view), and boxes are those of RandomResizedCrop."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from kpu.format.plan import CropSpec
from kpu.pixels.views import FULL, View, draw_views, resolve_view
from kpu.records.samples import sample_schema


def test_one_view_is_the_full_image() -> None:
    draws = draw_views(["a", "b"], 1, seed=0)
    assert draws.null_count == len(draws) == 2
    assert resolve_view(draws[0].as_py(), 640, 480) == FULL == View(None, False)


def test_column_has_the_type_of_the_sample_table() -> None:
    for views in (1, 3):
        assert draw_views(["a"], views, seed=0).type == sample_schema("folder").field("draws").type


def test_draws_do_not_depend_on_order_or_company() -> None:
    keys = [f"key {i}" for i in range(20)]
    together = draw_views(keys, 3, seed=7).to_pylist()
    backwards = draw_views(keys[::-1], 3, seed=7).to_pylist()
    for i, key in enumerate(keys):
        assert draw_views([key], 3, seed=7).to_pylist() == together[3 * i : 3 * i + 3]
        assert backwards[3 * (19 - i) : 3 * (20 - i)] == together[3 * i : 3 * i + 3]
    assert draw_views(["key 0"], 5, seed=7).to_pylist()[:3] == together[:3]


def test_draws_are_fixed_for_ever() -> None:
    # A cache is resumed by other releases on other machines: these numbers must never change.
    expected = [0.3539829, 0.0328617, 0.3739127, 0.6730336, 0.9523955]
    np.testing.assert_allclose(draw_views(["n01440764"], 2, seed=0).to_pylist()[1], expected, atol=1e-7)


def test_draws_differ_by_seed_key_and_view_and_are_uniform() -> None:
    keys = [f"{i}" for i in range(5000)]
    values = np.array(draw_views(keys, 2, seed=0).to_pylist())
    assert values.shape == (10000, 5)
    assert np.unique(values).size == values.size
    assert not np.isin(np.array(draw_views(keys, 2, seed=1).to_pylist()), values).any()
    assert values.min() >= 0 and values.max() < 1
    np.testing.assert_allclose(
        np.quantile(values, [0.1, 0.5, 0.9], axis=0), [[0.1] * 5, [0.5] * 5, [0.9] * 5], atol=0.02
    )
    assert np.abs(np.corrcoef(values.T) - np.eye(5)).max() < 0.04


@given(
    draws=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 5),
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
)
def test_box_lies_inside_whatever_the_image(draws: tuple[float, ...], width: int, height: int) -> None:
    box, flip = resolve_view(draws, width, height)
    assert box is not None
    left, upper, right, lower = box
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    assert flip == (draws[4] < 0.5)


@pytest.mark.parametrize("crop", [CropSpec(), CropSpec(scale=(0.4, 0.5), ratio=(1, 1.5))])
@pytest.mark.parametrize("size", [(500, 375), (100, 100), (300, 900), (32, 32)])
def test_boxes_are_distributed_as_those_of_torchvision(size: tuple[int, int], crop: CropSpec) -> None:
    width, height = size
    draws = draw_views([f"{i}" for i in range(2500)], 2, seed=3).to_pylist()
    ours = np.array([resolve_view(d, width, height, crop).box for d in draws], dtype=float)
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(blank, list(crop.scale), list(crop.ratio)) for _ in draws], dtype=float
    )
    for measured, expected in [
        (ours[:, 0], theirs[:, 1]),
        (ours[:, 1], theirs[:, 0]),
        (ours[:, 2] - ours[:, 0], theirs[:, 3]),
        (ours[:, 3] - ours[:, 1], theirs[:, 2]),
    ]:
        levels = [0.05, 0.25, 0.5, 0.75, 0.95]
        tolerance = 0.03 * max(width, height)
        np.testing.assert_allclose(np.quantile(measured, levels), np.quantile(expected, levels), atol=tolerance)


def test_how_often_views_are_flipped_can_be_chosen() -> None:
    draws = draw_views([f"{i}" for i in range(2000)], 2, seed=3).to_pylist()
    for flip in (0.0, 0.2, 1.0):
        flipped = np.mean([resolve_view(d, 32, 32, CropSpec(flip=flip)).flip for d in draws])
        assert abs(flipped - flip) < 0.03
    assert resolve_view(draws[0], 32, 32) == resolve_view(draws[0], 32, 32, CropSpec())


@pytest.mark.parametrize("change", [{"scale": (0.5, 0.4)}, {"scale": (0, 1)}, {"scale": (0.1, 1.1)}, {"ratio": (2, 1)}])
def test_crops_that_are_none_are_refused(change: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        CropSpec(**change)


def test_elongated_image_falls_back_to_the_largest_central_box() -> None:
    assert resolve_view([0.99, 0.5, 0.0, 0.0, 0.9], 1000, 10) == View((493, 0, 506, 10), False)
