"""Whether the tokens of a map lie where the map says: change a part of a picture, and see which tokens answer.

Two changes, of the upper half and of the left one, show most maps (`judge_halves`); what they do not show is asked
of each quadrant (`judge`).
Letters: B pictures, D channels, h and w the grid, T tokens, Q quadrants.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

HALVES, QUADRANTS = 2, 4
CHECK = 1  # raised when the check becomes stricter, so that what an older one found is not relied on
_SCALES = (2, 4, 8, 16, 32)  # cells along a side; the first tells the quadrants apart even for a mean over each
_STANDS_OUT = 1.25  # how much more a token answers to one quadrant than to the next
_ENOUGH = 0.25  # of the tokens must answer to one quadrant more than to others, or nothing is said
_RIGHT = 0.75  # of these must lie in it; transposed, permuted and wrongly folded maps reach a half at most
_RIGHT_AT_EDGES = 0.5  # of a first or last row or column; where tokens are shifted by one, an edge has none
_WRONG = 0.6  # a map is contradicted if at most so many lie in it, and either
_WRONG_OF = 0.75  # so many of all tokens are decided; of random mixtures, three fifths were
_MOVED_OF, _MOVED = 0.5, 0.75  # or so many, and so many of them answer as one to where their quadrant was moved
_SHIFTED_OF = 0.75  # or if an edge has none, of at least so many
_CLEAR_OF = 0.5  # of the tokens must answer clearly to both halves, for these to show a map
_CLEARLY_RIGHT = 0.9  # of these must lie in them; a map in another order reached .7 at most
_FEW = 4  # tokens; their mean is too much of each
_TINY = torch.finfo(torch.float64).tiny

Finding = Literal["proven", "contradicted", "open"]


class Judgement(NamedTuple):
    """What the pictures say of a map. `decided` of `tokens` answer to one quadrant, `right` of these lie in it."""

    finding: Finding
    right: int
    decided: int
    tokens: int


def pictures(size: tuple[int, int]) -> np.ndarray:
    """uint8 [1 + 2 + Q, H, W, 3]: a picture, and the same with parts of it from another picture.

    The parts are the upper half, the left half, and one quadrant after the other.
    """
    height, width = size
    first, second = (_picture(size, seed) for seed in (0, 1))
    result = np.repeat(first[None], 1 + HALVES + QUADRANTS, axis=0)
    (top, bottom), (left, right) = ((slice(0, side // 2), slice(side // 2, side)) for side in (height, width))
    everything = slice(None)
    places = [(top, everything), (everything, left), (top, left), (top, right), (bottom, left), (bottom, right)]
    for index, place in enumerate(places, 1):
        result[index][place] = second[place]
    return result


def judge_halves(maps_BDhw: Tensor) -> bool:
    """Whether a map [1 + 2, D, h, w] of the picture and its changed halves is shown to be right by these alone.

    In a changed half tokens move more than the mean of all, and outside less; those that do neither by a good measure
    are not counted. The rest must be many, and nearly all where the map says. No says nothing: `judge` is to be asked.
    """
    moved_Bdhw = (maps_BDhw[1:] - maps_BDhw[:1]).double()
    if maps_BDhw[0, 0].numel() <= 1:
        return False
    centred = moved_Bdhw - moved_Bdhw.mean((2, 3), keepdim=True)
    ways = [moved_Bdhw, centred] if maps_BDhw[0, 0].numel() > _FEW else [moved_Bdhw]
    return any(_halves_are_clear(way.norm(dim=1)) for way in ways)


def _halves_are_clear(distance_Bhw: Tensor) -> bool:
    """`distance_Bhw` says how far each token moves for the upper half, and for the left one."""
    down_h, right_w, inside_hw = _places(distance_Bhw)
    relative_Bhw = distance_Bhw / distance_Bhw.mean((1, 2), keepdim=True).clamp_min(_TINY)
    clear_Bhw = (relative_Bhw > _STANDS_OUT) | (relative_Bhw < 1 / _STANDS_OUT)
    right_Bhw = torch.stack([(relative_Bhw[0] > 1) == (down_h[:, None] == 0), (relative_Bhw[1] > 1) == (right_w == 0)])
    asked = [axis for axis, side in enumerate(distance_Bhw.shape[1:]) if side > 1]  # one line of tokens has no halves
    decided_hw = clear_Bhw[asked].all(0) & inside_hw
    found_hw = decided_hw & right_Bhw[asked].all(0)
    decided, found = int(decided_hw.sum()), int(found_hw.sum())
    if decided < max(2, _CLEAR_OF * int(inside_hw.sum())) or found < _CLEARLY_RIGHT * decided:
        return False
    lines = [(int(found_hw[edge].sum()), int(decided_hw[edge].sum())) for edge in _edges(inside_hw)]
    return all(right >= _RIGHT_AT_EDGES * of for right, of in lines)


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
    relative_QT = distance_QT / distance_QT.mean(1, keepdim=True).clamp_min(_TINY)
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
    moved = decided >= _MOVED_OF * tokens and _in_order(own_T[decided_T], best_T[decided_T]) >= _MOVED * decided
    wrong = right <= _WRONG * decided and (moved or decided >= _WRONG_OF * tokens)
    return Judgement("contradicted" if wrong or shifted else "open", right, decided, tokens)


def _in_order(own_T: Tensor, best_T: Tensor) -> int:
    """How many tokens answer to the quadrant that most tokens of theirs do: nearly all if quadrants were exchanged."""
    pairs = torch.zeros(QUADRANTS, QUADRANTS, dtype=torch.long, device=own_T.device)
    pairs.index_put_((own_T, best_T), torch.ones_like(own_T), accumulate=True)
    return int(pairs.amax(1).sum())


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
    down_h, right_w, inside_hw = _places(distance_Qhw)
    own_hw = down_h[:, None] * distance.shape[1] + right_w
    several = distance.shape[0] * distance.shape[1] > 1
    inside_hw = inside_hw if several else torch.zeros_like(inside_hw)
    lines = [edge[inside_hw] for edge in _edges(inside_hw)]
    return distance.flatten(0, 1)[:, inside_hw], own_hw[inside_hw], lines


def _places(distance_Bhw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_halves` of rows [h] and of columns [w], and a mask [h, w] of the tokens that lie in one quadrant."""
    down_h, right_w = (_halves(side).to(distance_Bhw.device) for side in distance_Bhw.shape[1:])
    return down_h, right_w, (down_h[:, None] >= 0) & (right_w >= 0)


def _edges(inside_hw: Tensor) -> list[Tensor]:
    """Masks [h, w] of the first and last row and column, of those that are several."""
    edges = []
    for axis, side in enumerate(inside_hw.shape):
        for index in (0, side - 1) if side > 1 else ():
            edge = torch.zeros_like(inside_hw)
            edge.select(axis, index).fill_(True)
            edges.append(edge)
    return edges


def _halves(side: int) -> Tensor:
    """For each of `side` positions 0 in the first half, 1 in the second, -1 across both; all 0 for one position."""
    position = torch.arange(side)
    half = (2 * position >= side).long()
    return half if side == 1 else torch.where(2 * position + 1 == side, -1, half)


def _picture(size: tuple[int, int], seed: int) -> np.ndarray:
    """uint8 [H, W, 3]: coloured blobs of several scales, and noise."""
    generator = np.random.default_rng(seed)
    values = torch.zeros((1, 3, *size))
    for cells in _SCALES:
        blobs = torch.from_numpy(generator.random((1, 3, cells, cells), np.float32) * 2 - 1)
        values += interpolate(blobs, size, mode="bilinear", align_corners=False)
    values += torch.from_numpy(generator.random((1, 3, *size), np.float32) * 2 - 1)
    pixels: np.ndarray = (127.5 + 60 * values[0]).clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8)
    return pixels
