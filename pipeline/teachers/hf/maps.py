"""How the tensors of a transformers model map the image, told from their shapes and what its configuration states.

Letters: B images, N tokens with those before and after the image's, D channels, H and W the image, h and w the grid.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from torch import Tensor

from pipeline.teachers.backbone import has_proportions, proportional_grid

MOST_PREFIX_TOKENS = 16
_WIDTHS = (
    "hidden_size", "hidden_sizes", "embed_dim", "embed_dims", "embed_dim_per_stage", "embedding_size", "d_model",
    "n_embd", "hidden_dim", "encoder_hidden_dim", "output_channels", "neck_hidden_sizes", "stage_out_channels",
    "fpn_hidden_size",
)  # fmt: skip
_DEPTHS = ("depths", "depth")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers")
_CLASS_TOKENS = ("num_cls_tokens", "n_cls_tokens", "num_summary_tokens")

Layout = Literal["tokens", "channels first", "channels last"]


@dataclass(frozen=True)
class Facts:
    """What a configuration states. `patch` is (H, W) of a patch; `registers` and `after` count tokens.

    `prefixes` are the numbers of tokens that may come before the image's, `layers` the number of blocks or stages.
    """

    widths: frozenset[int]
    patch: tuple[int, int] | None
    registers: int
    prefixes: frozenset[int]
    after: int
    layers: int


@dataclass(frozen=True)
class Reading:
    """One way to take a tensor for a map. `stated` says that all of it follows from the configuration."""

    layout: Layout
    grid: tuple[int, int]
    prefix: int = 0
    has_class: bool = False
    stated: bool = False

    def map(self, features: Tensor) -> Tensor:
        """[B, D, h, w]."""
        if self.layout == "channels first":
            return features
        if self.layout == "channels last":
            return features.permute(0, 3, 1, 2)
        count = self.grid[0] * self.grid[1]
        map_BDhw: Tensor = features[:, self.prefix : self.prefix + count].transpose(1, 2).unflatten(2, self.grid)
        return map_BDhw


def read_facts(config: Any) -> Facts:
    """Gather widths, patch size, further tokens and layers from a configuration, or from that of its backbone."""
    parts = [part for part in (config, getattr(config, "backbone_config", None)) if part is not None]
    registers = _first(parts, ("num_register_tokens",)) or 0
    classes = _first(parts, _CLASS_TOKENS)
    patch = _first(parts, ("patch_size",), sequence=True)
    return Facts(
        widths=frozenset(width for part in parts for width in _widths(part)),
        patch=_pair(patch) if patch is not None else None,
        registers=registers,
        prefixes=frozenset({0, 1, registers, 1 + registers, *((classes, classes + registers) if classes else ())}),
        after=_first(parts, ("num_detection_tokens",)) or 0,
        layers=count_layers(config),
    )


def count_layers(config: Any) -> int:
    """Stages of a model in stages, blocks of a plain one; 0 if the configuration states neither."""
    for part in (config, getattr(config, "backbone_config", None)):
        blocks = getattr(part, "blocks_per_stage", None)
        if _is_list(blocks):
            return sum(blocks)
        for key in _DEPTHS:
            stages = getattr(part, key, None)
            if _is_list(stages):
                return len(stages)
        found: int | None = _first([part], _LAYERS)
        if found:
            return found
    return 0


def reading_of(
    shape: Sequence[int], image: tuple[int, int], facts: Facts, layout: Layout | None = None
) -> Reading | None:
    """How a tensor of this shape maps an image of (H, W) pixels; None if in no way.

    `layout` decides where a map's channels may come first or last.
    """
    if len(shape) == 4:
        return _reading_of_map(shape, image, facts, layout)
    if len(shape) == 3:
        return _reading_of_tokens(shape, image, facts)
    return None


def layout_of(shapes: Iterable[Sequence[int]], image: tuple[int, int], facts: Facts) -> Layout | None:
    """The layout that all maps of one model share, from the first whose shape leaves no doubt."""
    for shape in shapes:
        possible = _layouts(shape, image, facts) if len(shape) == 4 else ()
        if len(possible) == 1:
            return possible[0][0]
    return None


def _reading_of_map(
    shape: Sequence[int], image: tuple[int, int], facts: Facts, layout: Layout | None
) -> Reading | None:
    possible = _layouts(shape, image, facts)
    if len(possible) == 1:
        found, grid, channels = possible[0]
        return Reading(found, grid, stated=channels in facts.widths)
    agreed = [each for each in possible if each[0] == layout] or possible
    return Reading(agreed[0][0], agreed[0][1]) if agreed else None


def _layouts(shape: Sequence[int], image: tuple[int, int], facts: Facts) -> list[tuple[Layout, tuple[int, int], int]]:
    """Layouts in which a 4-dimensional tensor has the image's proportions, the stated widths deciding between two."""
    ways: list[tuple[Layout, tuple[int, int], int]] = [
        ("channels first", (shape[2], shape[3]), shape[1]),
        ("channels last", (shape[1], shape[2]), shape[3]),
    ]
    possible = [way for way in ways if has_proportions(way[1], image)]
    return [way for way in possible if way[2] in facts.widths] or possible


def _reading_of_tokens(shape: Sequence[int], image: tuple[int, int], facts: Facts) -> Reading | None:
    _, count, channels = shape
    count -= facts.after
    wide = channels in facts.widths
    if facts.patch is not None:
        grid = (image[0] // facts.patch[0], image[1] // facts.patch[1])
        prefix = count - grid[0] * grid[1]
        if 0 <= prefix <= MOST_PREFIX_TOKENS and min(grid) > 0:
            return Reading("tokens", grid, prefix, prefix > facts.registers, wide and prefix in facts.prefixes)
    for prefix in sorted(facts.prefixes):
        found = proportional_grid(count - prefix, image)
        if found is not None:
            stated = wide and prefix == 0 and _by_halving(found, image, facts)
            return Reading("tokens", found, prefix, prefix > facts.registers, stated)
    return None


def _by_halving(grid: tuple[int, int], image: tuple[int, int], facts: Facts) -> bool:
    """Whether a grid is the image, or its grid of patches, halved some times, odd sides rounded up."""
    for start in (image, *([(image[0] // facts.patch[0], image[1] // facts.patch[1])] if facts.patch else [])):
        height, width = start
        while height > grid[0] and width > grid[1]:
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        if (height, width) == grid:
            return True
    return False


def _widths(config: Any) -> Iterator[int]:
    for key in _WIDTHS:
        found = getattr(config, key, None)
        if isinstance(found, int):
            yield found
        elif _is_list(found):
            yield from found
    first, stages = getattr(config, "embed_dim", None), getattr(config, "depths", None)
    if isinstance(first, int) and _is_list(stages):
        yield from (first * 2**stage for stage in range(len(stages)))


def _first(parts: Iterable[Any], keys: Sequence[str], *, sequence: bool = False) -> Any:
    values = (getattr(part, key, None) for part in parts for key in keys)
    return next((value for value in values if isinstance(value, int) or (sequence and _is_list(value))), None)


def _is_list(value: Any) -> TypeGuard[Sequence[int]]:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(each, int) for each in value)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))
