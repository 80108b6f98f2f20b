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
from pipeline.teachers.locality import Judgement, judge, judge_halves, pictures

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
    """A convolution's map [7, 8, h, w] of the pictures."""
    torch.manual_seed(0)
    x = torch.from_numpy(pictures(size)).permute(0, 3, 1, 2).float() / 255
    stride = (size[0] // grid[0], size[1] // grid[1])
    return nn.Conv2d(3, 8, stride, stride)(x).detach()


def by_quarters(map_BDhw: Tensor) -> Judgement:
    return judge(map_BDhw[[0, 3, 4, 5, 6]])


def is_contradicted(map_BDhw: Tensor) -> bool:
    """Not shown by halves, and found to be wrong by quarters."""
    return not judge_halves(map_BDhw[:3]) and by_quarters(map_BDhw).finding == "contradicted"


def as_tokens(map_BDhw: Tensor) -> Tensor:
    return map_BDhw.flatten(2)


def test_each_picture_changes_a_half_or_a_quarter() -> None:
    found = pictures((6, 9)).astype(int)
    assert found.shape == (7, 6, 9, 3)
    changed = (found[1:] != found[:1]).any(-1)
    expected = np.zeros((6, 6, 9), bool)
    expected[0, :3] = expected[1, :, :4] = True
    expected[2, :3, :4] = expected[3, :3, 4:] = expected[4, 3:, :4] = expected[5, 3:, 4:] = True
    assert not (changed & ~expected).any()
    assert changed.sum() > 0.9 * expected.sum()


@pytest.mark.parametrize(
    ("grid", "size"),
    [((2, 2), (112, 112)), ((7, 7), (112, 112)), ((14, 14), (112, 112)), ((8, 32), (64, 256)), ((1, 4), (32, 128)),
     ((4, 1), (128, 32)), ((3, 2), (96, 64)), ((2, 2), (4, 4))],
)  # fmt: skip
def test_right_maps_are_proven(grid: tuple[int, int], size: tuple[int, int]) -> None:
    map_BDhw = maps(grid, size)
    assert judge_halves(map_BDhw[:3])
    assert by_quarters(map_BDhw).finding == "proven"
    assert is_contradicted(map_BDhw.flip(2, 3))


@pytest.mark.parametrize("side", [2, 4, 7, 14])
def test_wrong_orders_are_contradicted(side: int) -> None:
    map_BDhw = maps((side, side))
    tokens = as_tokens(map_BDhw)
    permuted = tokens[:, :, torch.randperm(side * side, generator=torch.Generator().manual_seed(1))]
    for wrong in (map_BDhw.transpose(2, 3), map_BDhw.flip(3), map_BDhw.flip(2), permuted.unflatten(2, (side, side))):
        assert is_contradicted(wrong)
    for by in (1, -1, side, -side):  # as when tokens before or after the map are taken for the image's
        assert is_contradicted(tokens.roll(by, 2).unflatten(2, (side, side)))


def test_windows_and_wrong_folds_are_contradicted() -> None:
    map_BDhw = maps((14, 14))
    windows = map_BDhw.unflatten(2, (2, 7)).unflatten(4, (2, 7)).permute(0, 1, 2, 4, 3, 5).flatten(2)
    blocks = map_BDhw.unflatten(2, (7, 2)).unflatten(4, (7, 2)).permute(0, 1, 2, 4, 3, 5).flatten(2)
    for tokens in (windows, blocks):
        assert is_contradicted(tokens.unflatten(2, (14, 14)))
    oblong = as_tokens(maps((8, 32), (64, 256)))
    for grid in ((16, 16), (4, 64)):
        assert is_contradicted(oblong.unflatten(2, grid))


@pytest.mark.parametrize("mixed", [0, 3])
def test_orders_that_keep_some_rows_are_not_proven(mixed: float) -> None:
    """Every other row, or the lower half, from right to left; pairs of rows unrolled in blocks."""
    map_BDhw = maps((14, 14))
    map_BDhw = map_BDhw + mixed * map_BDhw.mean((2, 3), keepdim=True)
    snake, lower = map_BDhw.clone(), map_BDhw.clone()
    snake[:, :, 1::2] = snake[:, :, 1::2].flip(3)
    lower[:, :, 7:] = lower[:, :, 7:].flip(3)
    blocks = (
        map_BDhw.unflatten(2, (7, 2)).unflatten(4, (7, 2)).permute(0, 1, 2, 4, 3, 5).flatten(2).unflatten(2, (14, 14))
    )
    for wrong in (snake, lower, blocks):
        assert is_contradicted(wrong)


def test_what_moves_all_tokens_alike_does_not_hide_a_map() -> None:
    map_BDhw = maps((7, 7))
    mixed = map_BDhw + 30 * map_BDhw.mean((2, 3), keepdim=True)
    assert judge_halves(mixed[:3])
    assert by_quarters(mixed).finding == "proven"
    assert is_contradicted(mixed.transpose(2, 3))


def test_a_map_of_equal_tokens_stays_open() -> None:
    map_BDhw = maps((7, 7))
    for equal in (map_BDhw.mean((2, 3), keepdim=True).expand_as(map_BDhw), torch.zeros(7, 8, 7, 7), maps((1, 1))):
        assert by_quarters(equal).finding == "open"
        assert not judge_halves(equal[:3])


@pytest.mark.parametrize("seed", range(8))
def test_a_random_mixture_of_all_tokens_stays_open(seed: int) -> None:
    """Each token answers to each quarter by a random measure, as deep in a mixer of random weights."""
    generator = torch.Generator().manual_seed(seed)
    moved = (
        torch.randn(7, 8, 14, 14, generator=generator) * (torch.randn(7, 1, 14, 14, generator=generator) * 0.5).exp()
    )
    moved[0] = 0
    assert by_quarters(moved).finding == "open"
    assert not judge_halves(moved[:3])


def test_a_weak_map_whose_quarters_are_exchanged_is_contradicted() -> None:
    """Three fifths of the tokens answer to their quarter, the others to all alike."""
    moved = torch.ones(7, 1, 10, 10)
    moved[0] = 0
    for quarter, (rows, columns) in enumerate([(0, 0), (0, 5), (5, 0), (5, 5)], 3):
        moved[quarter, :, rows : rows + 3, columns : columns + 5] = 2
    assert by_quarters(moved).finding == "proven"
    for wrong in (moved.transpose(2, 3), moved.flip(3), moved.flip(2), moved.flip(2, 3)):
        assert by_quarters(wrong).finding == "contradicted"


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
    assert (first, sizes) == ([2, 2], [2])
    build(tmp_path, "'patch': map * 2")  # another source file, another fingerprint
    assert sizes == [2, 2, 2]
