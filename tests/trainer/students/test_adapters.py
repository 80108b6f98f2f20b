"""Adapters: what they compute, where they start, and that rows stay apart."""

import numpy as np
import pytest
import torch
from torch import nn

from trainer.data.shapes import OutputShape
from trainer.students.adapters import (
    Beside,
    Bottleneck,
    ConvolutionBlock,
    Entry,
    MapAdapter,
    StandardizedConvolution,
    VectorAdapter,
    map_of,
    tokens_of,
)

SHAPES = {
    "global": OutputShape(5),
    "patch": OutputShape(6, (4, 4)),
    "fine": OutputShape(3, (8, 8)),
    "finest": OutputShape(2, (16, 16)),
}
OUTPUTS = {"global": 5, "patch": 6}


def inputs(shapes: dict[str, OutputShape], rows: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {n: torch.randn(rows, *(() if s.grid is None else (s.tokens,)), s.channels) for n, s in shapes.items()}


def test_tokens_lie_row_by_row() -> None:
    x_BTC = torch.arange(12.0).view(1, 6, 2)
    map_BCHV = map_of(x_BTC, (2, 3))
    assert map_BCHV[0, 1, 1, 2] == x_BTC[0, 5, 1]
    assert map_BCHV[0, 0, 0, 2] == x_BTC[0, 2, 0]
    assert map_BCHV.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(tokens_of(map_BCHV), x_BTC)


def test_filters_are_standardised() -> None:
    convolution = StandardizedConvolution(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 5, 5)
    plain = nn.Conv2d(3, 4, 3, padding=1)
    weight = convolution.weight.detach().double().numpy().reshape(4, -1)
    weight = weight - weight.mean(1, keepdims=True)
    weight = weight / np.sqrt((weight**2).sum(1, keepdims=True))
    plain.weight.data = torch.from_numpy(weight).float().view(4, 3, 3, 3)
    plain.bias = convolution.bias
    torch.testing.assert_close(convolution(x), plain(x))
    convolution.weight.data = convolution.weight.data * 7 + 3  # neither scale nor mean matters
    torch.testing.assert_close(convolution(x), plain(x), atol=1e-4, rtol=1e-4)


def test_block_keeps_its_input() -> None:
    block = ConvolutionBlock(4)
    nn.init.zeros_(block.layers[2].weight)
    x = torch.randn(2, 4, 3, 3)
    before = x.clone()
    assert torch.equal(block(x), before)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("grid", "strided"),
    [((4, 4), False), ((8, 8), True), ((12, 12), True), ((16, 16), True), ((6, 6), False), ((2, 2), False)],
)
def test_entry_reaches_its_grid(grid: tuple[int, int], strided: bool) -> None:
    entry = Entry(OutputShape(3, grid), (4, 4), 5)
    assert entry.strided == strided
    assert entry(torch.randn(2, grid[0] * grid[1], 3)).shape == (2, 5, 4, 4)


@pytest.mark.parametrize(
    "names", [("patch",), ("patch", "global"), ("patch", "fine"), ("global", "patch", "fine", "finest")]
)
def test_shapes_and_that_every_parameter_and_input_matters(names: tuple[str, ...]) -> None:
    shapes = {name: SHAPES[name] for name in names}
    adapter = MapAdapter(shapes, (4, 4), OUTPUTS, 16, 1)
    x = {name: tensor.requires_grad_() for name, tensor in inputs(shapes).items()}
    found = adapter(x)
    assert {name: tuple(z.shape) for name, z in found.items()} == {"global": (3, 5), "patch": (3, 16, 6)}
    sum(z.square().sum() for z in found.values()).backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    for name, tensor in x.items():
        assert tensor.grad is not None and tensor.grad.abs().max() > 0, name


def test_blocks_stand_on_one_grid_however_fine_the_maps() -> None:
    adapter = MapAdapter(SHAPES, (4, 4), OUTPUTS, 16, 2)
    seen = set()
    for part in adapter.modules():
        if isinstance(part, ConvolutionBlock):
            part.register_forward_hook(lambda _m, _a, found: seen.add(tuple(found.shape[1:])))
    adapter(inputs(SHAPES))
    assert seen == {(16, 4, 4)}


def test_rows_do_not_touch_each_other() -> None:
    adapter = MapAdapter(SHAPES, (4, 4), OUTPUTS, 16, 1).train()
    x = inputs(SHAPES)
    changed = {name: torch.cat([tensor[:2], torch.zeros_like(tensor[2:])]) for name, tensor in x.items()}
    found = adapter(x)
    assert list(found) == list(OUTPUTS)
    for name, z in found.items():
        assert torch.allclose(z[:2], adapter(changed)[name][:2], atol=1e-6)
        assert not torch.allclose(z[2:], adapter(changed)[name][2:], atol=1e-3)


def test_vectors_only() -> None:
    adapter = VectorAdapter({"global": OutputShape(5), "other": OutputShape(2)}, 5, 8, 3)
    found = adapter({"global": torch.randn(4, 5), "other": torch.randn(4, 2)})
    assert list(found) == ["global"]
    assert found["global"].shape == (4, 5)


def test_bottleneck_is_its_formula() -> None:
    adapter = Bottleneck(2, 1, 2)
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[1.0, -2.0]]))
        adapter.down.bias.fill_(1.0)
        adapter.up.weight.copy_(torch.tensor([[3.0], [4.0]]))
        adapter.up.bias.copy_(torch.tensor([0.5, 0.0]))
        adapter.gamma.copy_(torch.tensor([1.0, 10.0]))
    x = torch.tensor([[[2.0, 1.0], [0.0, 3.0]]])  # down: 1, -5; after ReLU: 1, 0
    assert torch.allclose(adapter(x), torch.tensor([[[3.5, 40.0], [0.5, 0.0]]]))


def test_bottleneck_takes_the_positions_of_a_strided_block() -> None:
    adapter = Bottleneck(2, 3, 4, axis=1, stride=(2, 2))
    nn.init.ones_(adapter.gamma)
    x = torch.randn(1, 2, 5, 5)
    found = adapter(x)
    assert found.shape == (1, 4, 3, 3)
    expected = adapter.up(adapter.down(x[0, :, 2, 4]).relu())
    assert torch.allclose(found[0, :, 1, 2], expected, atol=1e-6)


def test_beside_starts_at_the_block_and_can_be_silent() -> None:
    beside = Beside(nn.Linear(3, 3), Bottleneck(3, 2, 3))
    x = torch.randn(2, 4, 3)
    assert torch.equal(beside(x), beside.block(x))
    nn.init.ones_(beside.adapter.gamma)
    assert torch.equal(beside(x), beside.block(x) + beside.adapter(x))
    beside.active = False
    assert torch.equal(beside(x), beside.block(x))
