"""Maps are proven by changing a quarter of a picture: the tokens that answer must lie there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kpu.errors import TeacherError
from pipeline.sections import TeacherConfig
from pipeline.teachers import FrozenTeacher, build_teacher
from pipeline.teachers.locality import judge, pictures

MODULE = '''
import torch
from torch import nn


class Own(nn.Module):
    """A convolution of stride 8 over {size} pixels, whose map `answer` reorders."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 6, 8, 8)
        self.norm = nn.BatchNorm2d(6)
        self.data_config = {{"input_size": (3, *{size}), "mean": (0.5,) * 3, "std": (0.5,) * 3}}

    def forward(self, images):
        map = self.convolution(images)
        tokens = map.flatten(2).transpose(1, 2)
        return {{"global": map.mean((2, 3)), {answer}}}


def own():
    return Own()
'''


@pytest.fixture(autouse=True)
def nothing_is_proven_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def build(folder: Path, answer: str, size: tuple[int, int] = (64, 64), **options: Any) -> FrozenTeacher:
    file = folder / "own.py"
    file.write_text(MODULE.format(size=size, answer=answer))
    config = {"model": f"torch:{file}:own", "weights": "random", **options}
    return build_teacher("t", TeacherConfig.model_validate(config))


def maps(grid: tuple[int, int], size: tuple[int, int] = (112, 112)) -> Tensor:
    """A convolution's map [5, 8, h, w] of the pictures."""
    torch.manual_seed(0)
    x = torch.from_numpy(pictures(size)).permute(0, 3, 1, 2).float() / 255
    stride = (size[0] // grid[0], size[1] // grid[1])
    return nn.Conv2d(3, 8, stride, stride)(x).detach()


def as_tokens(map_BDhw: Tensor) -> Tensor:
    return map_BDhw.flatten(2)


def test_each_picture_changes_one_quarter() -> None:
    found = pictures((6, 9)).astype(int)
    assert found.shape == (5, 6, 9, 3)
    changed = (found[1:] != found[:1]).any(-1)
    expected = np.zeros((4, 6, 9), bool)
    expected[0, :3, :4] = expected[1, :3, 4:] = expected[2, 3:, :4] = expected[3, 3:, 4:] = True
    assert not (changed & ~expected).any()
    assert changed.sum() > 0.9 * expected.sum()


@pytest.mark.parametrize(
    ("grid", "size"),
    [((2, 2), (112, 112)), ((7, 7), (112, 112)), ((14, 14), (112, 112)), ((8, 32), (64, 256)), ((1, 4), (32, 128)),
     ((4, 1), (128, 32)), ((3, 2), (96, 64)), ((2, 2), (4, 4))],
)  # fmt: skip
def test_right_maps_are_proven(grid: tuple[int, int], size: tuple[int, int]) -> None:
    map_BDhw = maps(grid, size)
    assert judge(map_BDhw).finding == "proven"
    assert judge(map_BDhw.flip(2, 3)).finding == "contradicted"


@pytest.mark.parametrize("side", [2, 4, 7, 14])
def test_wrong_orders_are_contradicted(side: int) -> None:
    map_BDhw = maps((side, side))
    tokens = as_tokens(map_BDhw)
    permuted = tokens[:, :, torch.randperm(side * side, generator=torch.Generator().manual_seed(1))]
    for wrong in (map_BDhw.transpose(2, 3), map_BDhw.flip(3), map_BDhw.flip(2), permuted.unflatten(2, (side, side))):
        assert judge(wrong).finding == "contradicted"
    for by in (1, -1, side, -side):  # as when tokens before or after the map are taken for the image's
        assert judge(tokens.roll(by, 2).unflatten(2, (side, side))).finding == "contradicted"


def test_windows_and_wrong_folds_are_contradicted() -> None:
    map_BDhw = maps((14, 14))
    windows = map_BDhw.unflatten(2, (2, 7)).unflatten(4, (2, 7)).permute(0, 1, 2, 4, 3, 5).flatten(2)
    blocks = map_BDhw.unflatten(2, (7, 2)).unflatten(4, (7, 2)).permute(0, 1, 2, 4, 3, 5).flatten(2)
    for tokens in (windows, blocks):
        assert judge(tokens.unflatten(2, (14, 14))).finding == "contradicted"
    oblong = as_tokens(maps((8, 32), (64, 256)))
    for grid in ((16, 16), (4, 64)):
        assert judge(oblong.unflatten(2, grid)).finding == "contradicted"


def test_what_moves_all_tokens_alike_does_not_hide_a_map() -> None:
    map_BDhw = maps((7, 7))
    mixed = map_BDhw + 30 * map_BDhw.mean((2, 3), keepdim=True)
    assert judge(mixed).finding == "proven"
    assert judge(mixed.transpose(2, 3)).finding == "contradicted"


def test_a_map_of_equal_tokens_stays_open() -> None:
    map_BDhw = maps((7, 7))
    assert judge(map_BDhw.mean((2, 3), keepdim=True).expand_as(map_BDhw)).finding == "open"
    assert judge(torch.zeros(5, 8, 7, 7)).finding == "open"
    assert judge(maps((1, 1))).finding == "open"


@pytest.mark.parametrize(
    "answer",
    ["'patch': map.transpose(2, 3)", "'patch': tokens.flip(1)", "'patch': tokens[:, torch.randperm(64)]",
     "'patch': torch.cat([tokens[:, -1:], tokens[:, :-1]], 1)"],
)  # fmt: skip
def test_a_module_with_another_order_is_refused(tmp_path: Path, answer: str) -> None:
    with pytest.raises(TeacherError, match=r"patch: expected tokens in the order of the image.*8 x 8, found another|"
                       "the same features for the same image"):  # fmt: skip
        build(tmp_path, answer)
    assert build(tmp_path, answer, outputs=["global"]).outputs[0].shape == (6,)


def test_a_module_whose_layer_is_out_of_order_is_refused(tmp_path: Path) -> None:
    answer = "'patch': map, 'late': map.transpose(2, 3)"
    with pytest.raises(TeacherError, match=r"late\.patch: expected tokens in the order of the image.*late out of"):
        build(tmp_path, answer, layers=["late"])
    assert build(tmp_path, answer).unproven is None


def test_tokens_fold_to_the_images_proportions(tmp_path: Path) -> None:
    teacher = build(tmp_path, "'patch': tokens", (64, 256))
    assert teacher.outputs[1].grid == (8, 32)
    assert build(tmp_path, "'patch': tokens", (64, 64)).outputs[1].grid == (8, 8)
    with pytest.raises(TeacherError, match=r"'patch': expected .* the image's proportions .* \[2, 255, 6\]"):
        build(tmp_path, "'patch': tokens[:, 1:]", (64, 256))


def test_a_map_that_mixes_everything_is_refused_unless_accepted(tmp_path: Path) -> None:
    answer = "'patch': map.mean((2, 3), keepdim=True).expand_as(map)"
    with pytest.raises(TeacherError, match=r"found none that tell the quarters .* unproven: accept, or leave patch"):
        build(tmp_path, answer)
    teacher = build(tmp_path, answer, unproven="accept")
    assert teacher.unproven == ("patch",)
    with pytest.raises(TeacherError, match="found none that tell the quarters"):  # accepting once is not for ever
        build(tmp_path, answer)


@pytest.mark.parametrize("answer", ["'patch': map + torch.rand_like(map)", "'patch': self.norm.train()(map)"])
def test_features_that_differ_from_batch_to_batch_are_refused(tmp_path: Path, answer: str) -> None:
    with pytest.raises(TeacherError, match="'patch': expected the same features for the same image in every batch"):
        build(tmp_path, answer)


def test_what_was_proven_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    passed = nn.Conv2d.forward

    def counting(self: nn.Conv2d, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return passed(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", counting)
    build(tmp_path, "'patch': map")
    first, sizes[:] = list(sizes), []
    build(tmp_path, "'patch': map")
    assert (first, sizes) == ([2, 4], [2])
    build(tmp_path, "'patch': map * 2")  # another source file, another fingerprint
    assert sizes == [2, 2, 4]
