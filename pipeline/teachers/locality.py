"""Whether the tokens of a map lie where the map says: change a part of a picture, and see which tokens answer.

Letters: B pictures, D channels, h and w the grid, T tokens, Q quadrants.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

QUADRANTS = 4
CHECK = 1  # raised when the check becomes stricter, so that what an older one found is not relied on
_SCALES = (2, 4, 8, 16, 32)  # cells along a side; the first tells the quadrants apart even for a mean over each
_STANDS_OUT = 1.25  # how much more a token answers to one quadrant than to the next
_ENOUGH = 0.25  # of the tokens must answer to one quadrant more than to others, or nothing is said
_RIGHT = 0.75  # of these must lie in it; transposed, permuted and wrongly folded maps reach a half at most
_RIGHT_AT_EDGES = 0.5  # of a first or last row or column; where tokens are shifted by one, an edge has none
_WRONG, _WRONG_OF = 0.6, 0.5  # a map is contradicted if at most so many lie in it, of at least so many of all tokens
_SHIFTED_OF = 0.75  # or if an edge has none, of at least so many
_FEW = 4  # tokens; their mean is too much of each

Finding = Literal["proven", "contradicted", "open"]


class Judgement(NamedTuple):
    """What the pictures say of a map. `decided` of `tokens` answer to one quadrant, `right` of these lie in it."""

    finding: Finding
    right: int
    decided: int
    tokens: int


def pictures(size: tuple[int, int]) -> np.ndarray:
    """uint8 [1 + Q, H, W, 3]: a picture, and the same with one quadrant after the other from another picture."""
    height, width = size
    first, second = (_picture(size, seed) for seed in (0, 1))
    result = np.repeat(first[None], 1 + QUADRANTS, axis=0)
    rows, columns = ((slice(0, side // 2), slice(side // 2, side)) for side in (height, width))
    for index, (down, right) in enumerate((d, r) for d in (0, 1) for r in (0, 1)):
        place = rows[down], columns[right]
        result[index + 1][place] = second[place]
    return result


def judge(maps_BDhw: Tensor) -> Judgement:
    """Compare where tokens answer to `pictures` with where the map [1 + Q, D, h, w] says that they lie.

    A token answers to a quadrant by how far its features move, relative to all tokens' mean. What moves all tokens
    alike, as global attention or a pooled gate does, says nothing of places: where the tokens do not tell the
    quadrants apart, they are compared once more without their common movement. "open" is a map whose tokens still do
    not, or that is one token.
    """
    moved_QDhw = (maps_BDhw[1:] - maps_BDhw[:1]).double()
    found = _judge(moved_QDhw)
    if found.finding != "proven" and maps_BDhw[0, 0].numel() > _FEW:
        again = _judge(moved_QDhw - moved_QDhw.mean((2, 3), keepdim=True))
        if again.finding == "proven" or found.finding == "open":
            return again
    return found


def _judge(moved_QDhw: Tensor) -> Judgement:
    distance_QT, own_T, edges = _by_place(moved_QDhw.norm(dim=1))
    tokens = int(own_T.numel())
    if not tokens or not bool((distance_QT > 0).any()):
        return Judgement("open", 0, 0, tokens)
    relative_QT = distance_QT / distance_QT.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    best_T = relative_QT.argmax(0)
    top_2T = relative_QT.topk(2, dim=0).values
    decided_T = top_2T[0] > _STANDS_OUT * top_2T[1]
    right_T = decided_T & (best_T == own_T)
    decided, right = int(decided_T.sum()), int(right_T.sum())
    if decided < max(2, _ENOUGH * tokens):
        return Judgement("open", right, decided, tokens)
    lines = [(int(right_T[edge].sum()), int(decided_T[edge].sum())) for edge in edges]
    if right >= _RIGHT * decided and all(found >= _RIGHT_AT_EDGES * of for found, of in lines):
        return Judgement("proven", right, decided, tokens)
    shifted = decided >= _SHIFTED_OF * tokens and any(found == 0 and of > 1 for found, of in lines)
    wrong = decided >= _WRONG_OF * tokens and right <= _WRONG * decided
    return Judgement("contradicted" if wrong or shifted else "open", right, decided, tokens)


def _by_place(distance_Qhw: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Distances [Q, T] of the tokens that lie in one quadrant, which one [T], and masks [T] of the outer lines.

    Where the grid is one token high or wide, halves take the place of quadrants.
    """
    height, width = distance_Qhw.shape[1:]
    distance = distance_Qhw.unflatten(0, (2, 2))
    if height == 1:
        distance = distance.sum(0, keepdim=True)
    if width == 1:
        distance = distance.sum(1, keepdim=True)
    down_h, right_w = _halves(height).to(distance.device), _halves(width).to(distance.device)
    own_hw = down_h[:, None] * distance.shape[1] + right_w
    inside_hw = (down_h[:, None] >= 0) & (right_w >= 0)
    lines = []
    for axis, side in ((0, height), (1, width)):
        for index in (0, side - 1) if side > 1 else ():
            line = torch.zeros_like(inside_hw)
            line.select(axis, index).fill_(True)
            lines.append(line[inside_hw])
    several = distance.shape[0] * distance.shape[1] > 1
    inside_hw = inside_hw if several else torch.zeros_like(inside_hw)
    return distance.flatten(0, 1)[:, inside_hw], own_hw[inside_hw], lines


def _halves(side: int) -> Tensor:
    """For each of `side` positions 0 in the first half, 1 in the second, -1 across both; all 0 for one position."""
    position = torch.arange(side)
    half = (2 * position >= side).long()
    return half if side == 1 else torch.where(2 * position + 1 == side, -1, half)


def _picture(size: tuple[int, int], seed: int) -> np.ndarray:
    """uint8 [H, W, 3]: coloured blobs of several scales, and noise."""
    generator = np.random.default_rng(seed)
    values = torch.zeros((1, 3, *size), dtype=torch.float64)
    for cells in _SCALES:
        blobs = torch.from_numpy(generator.uniform(-1, 1, (1, 3, cells, cells)))
        values = values + interpolate(blobs, size, mode="bilinear", align_corners=False)
    values = values + torch.from_numpy(generator.uniform(-1, 1, (1, 3, *size)))
    pixels: np.ndarray = (127.5 + 60 * values[0]).clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8)
    return pixels
