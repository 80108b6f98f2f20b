"""Building blocks of students: adapters on cached features, and adapters beside the blocks of a frozen model.

No layer mixes rows, so a row of weight 0 touches no other, and batches of any size or on any number of workers agree.

Letters: B rows, T tokens of a map, C channels of an input, W width; H and V the two sides of a grid.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.shapes import OutputShape, TokenGrid
from trainer.objective.losses import resize_map

_GROUPS = 8
_EXPANSION = 4
_SMALLEST = 1e-4  # of a filter's sum of squares, so that none is divided by zero


def tokens_of(map_BCHV: Tensor) -> Tensor:
    """[B, C, H, V] as [B, H * V, C], row by row; without a copy where channels lie last in memory."""
    tokens_BTC: Tensor = map_BCHV.permute(0, 2, 3, 1).flatten(1, 2)
    return tokens_BTC


def map_of(tokens_BTC: Tensor, grid: TokenGrid) -> Tensor:
    """[B, H * V, C] as [B, C, H, V] with channels last in memory, without a copy."""
    map_BCHV: Tensor = tokens_BTC.unflatten(1, grid).permute(0, 3, 1, 2)
    return map_BCHV


class StandardizedConvolution(nn.Conv2d):
    """A convolution whose filters are brought to mean 0 and sum of squares 1 on every use.

    Weight standardisation, Qiao et al. 2019 (arXiv 1903.10520); with group normalisation it trains as batch
    normalisation does, which would mix rows.
    """

    def forward(self, x_BCHV: Tensor) -> Tensor:
        """As `nn.Conv2d`."""
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        length = weight.square().sum((1, 2, 3), keepdim=True).clamp(min=_SMALLEST)
        found: Tensor = self._conv_forward(x_BCHV, weight * length.rsqrt(), self.bias)
        return found


class ConvolutionBlock(nn.Module):
    """x + conv(ReLU(norm(x))), 3 x 3.

    The pre-activation form of He et al. 2016 (arXiv 1603.05027) with group normalisation. One convolution a block: on a
    CPU norm, ReLU and sum cost as much as a narrower convolution, so bottlenecks are hardly faster.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        convolution = StandardizedConvolution(width, width, 3, padding=1, bias=False)
        self.layers = nn.Sequential(*_activation(width), convolution)

    def forward(self, x_BWHV: Tensor) -> Tensor:
        """[B, W, H, V] to the same."""
        changed_BWHV: Tensor = self.layers(x_BWHV)
        return x_BWHV + changed_BWHV


class Entry(nn.Module):
    """A map of any grid, as tokens, to [B, W, H, V] on the grid `to`.

    From a grid finer by a whole factor by one strided convolution, from an equal one by a linear map per token, from
    any other by a bilinear resize before it.
    """

    def __init__(self, shape: OutputShape, to: TokenGrid, width: int) -> None:
        super().__init__()
        assert shape.grid is not None
        self.grid, self.target = shape.grid, to
        factor = shape.grid[0] // to[0]
        self.strided = factor > 1 and shape.grid == (factor * to[0], factor * to[1])
        # An even factor takes one more position than it steps, so that neighbouring windows overlap.
        size, padding = (factor + 1, factor // 2) if factor % 2 == 0 else (factor, 0)
        self.layer: nn.Module = (
            StandardizedConvolution(shape.channels, width, size, stride=factor, padding=padding)
            if self.strided
            else nn.Linear(shape.channels, width)
        )

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] to [B, W, H, V]."""
        if self.strided:
            found: Tensor = self.layer(map_of(x_BTC, self.grid))
            return found
        return map_of(self.layer(resize_map(x_BTC, self.grid, self.target)), self.target)


class MapAdapter(nn.Module):
    """Maps and vectors to one change per wanted output: all enter the target's grid and are summed, blocks follow.

    Finer maps come down at once, so that nearly all computation happens on the target's grid, where a convolution of
    many channels costs least for what it learns (`docs/decisions.md`).

    Args:
        inputs: shapes by name, with at least one map.
        target: the grid of `patch`.
        outputs: channels of `global`, `patch` or both.
        width: channels inside.
        depth: blocks.
    """

    def __init__(
        self, inputs: Mapping[str, OutputShape], target: TokenGrid, outputs: Mapping[str, int], width: int, depth: int
    ) -> None:
        super().__init__()
        maps = {name: shape for name, shape in inputs.items() if shape.grid is not None}
        self.maps = tuple(maps)
        self.vectors = tuple(name for name in inputs if name not in maps)
        channels = sum(inputs[name].channels for name in self.vectors)
        self.entries = nn.ModuleList([Entry(shape, target, width) for shape in maps.values()])
        self.spread = nn.Linear(channels, width) if self.vectors else None
        self.blocks = nn.Sequential(*(ConvolutionBlock(width) for _ in range(depth)))
        self.last = nn.Sequential(*_activation(width))
        self.patch = nn.Linear(width, outputs["patch"]) if "patch" in outputs else None
        self.summary = _perceptron(width + channels, outputs["global"], 2 * width) if "global" in outputs else None

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name to `global` [B, D] and `patch` [B, T, D], as far as they are wanted."""
        vectors = [inputs[name] for name in self.vectors]
        entered = [entry(inputs[name]) for name, entry in zip(self.maps, self.entries, strict=True)]
        if self.spread is not None:
            entered.append(self.spread(torch.cat(vectors, dim=-1))[:, :, None, None])
        tokens_BTW = tokens_of(self.last(self.blocks(sum(entered))))
        found: dict[str, Tensor] = {}
        if self.summary is not None:
            found["global"] = self.summary(torch.cat([tokens_BTW.mean(dim=1), *vectors], dim=-1))
        if self.patch is not None:
            found["patch"] = self.patch(tokens_BTW)
        return found


class VectorBlock(nn.Module):
    """x + a perceptron of one hidden layer, four times as wide, after a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), _perceptron(width, width, _EXPANSION * width))

    def forward(self, x_BW: Tensor) -> Tensor:
        """[B, W] to the same."""
        changed_BW: Tensor = self.layers(x_BW)
        return x_BW + changed_BW


class VectorAdapter(nn.Module):
    """Vectors alone to a change of `global`: a residual perceptron of `depth` blocks."""

    def __init__(self, inputs: Mapping[str, OutputShape], channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.names = tuple(inputs)
        self.layers = nn.Sequential(
            nn.Linear(sum(shape.channels for shape in inputs.values()), width),
            *(VectorBlock(width) for _ in range(depth)),
            nn.LayerNorm(width),
            nn.Linear(width, channels),
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors [B, C] by name to `global` [B, D]."""
        return {"global": self.layers(torch.cat([inputs[name] for name in self.names], dim=-1))}


class Bottleneck(nn.Module):
    """gamma * up(ReLU(down(x))), gamma per channel and zero at the start; channels are on `axis` (1 or -1).

    Where the block beside it makes a map smaller by `stride`, every `stride`-th position is taken, from the first.
    """

    def __init__(self, channels: int, width: int, out: int, axis: int = -1, stride: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.axis, self.stride = axis, stride
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, out)
        self.gamma = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C], [B, H, V, C] or, with axis 1, [B, C, H, V], to the shape that the block beside it gives."""
        x = x.movedim(self.axis, -1)
        if self.stride != (1, 1):
            x = x[:, :: self.stride[0], :: self.stride[1]]
        changed: Tensor = self.gamma * self.up(self.down(x).relu())
        return changed.movedim(-1, self.axis)


class Beside(nn.Module):
    """A frozen block with a trainable adapter in parallel; the block alone while `active` is false."""

    def __init__(self, block: nn.Module, adapter: Bottleneck) -> None:
        super().__init__()
        self.block, self.adapter, self.active = block, adapter, True

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """What the block gives, plus the adapter's change."""
        found: Tensor = self.block(x, *arguments, **options)
        return found + self.adapter(x) if self.active else found


def _activation(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.GroupNorm(math.gcd(channels, _GROUPS), channels), nn.ReLU(inplace=True)


def _perceptron(channels: int, out: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, out))
