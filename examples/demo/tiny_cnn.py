"""A small convolutional network as a KPU teacher: what `torch:examples/demo/tiny_cnn.py:<factory>` needs to find.

A factory returns a module that maps normalised images to a dictionary of named features. `head` (optional) is its
linear classifier on `global`, `data_config` its preprocessing under timm's keys.

Letters: B images of H x W pixels, D channels; h, w the height and width of the map, half of H and W.
"""

from typing import Any

import torch
from torch import nn

MEAN = (0.305, 0.305, 0.305)
STD = (0.376, 0.376, 0.376)


def general() -> nn.Module:
    """The general-purpose teacher: told which way up a digit is, never which digit it is."""
    return TinyCNN(size=16, width=32, classes=4)


def specialist() -> nn.Module:
    """A teacher of five digits; the last of its six classes is any other digit."""
    return TinyCNN(size=8, width=24, classes=6)


class TinyCNN(nn.Module):
    """Three 3 x 3 convolutions with batch normalisation, the second of stride 2; D is twice `width`."""

    def __init__(self, size: int, width: int, classes: int) -> None:
        super().__init__()
        channels = 2 * width
        self.layers = nn.Sequential(
            _convolution(3, width, stride=1),
            _convolution(width, channels, stride=2),
            _convolution(channels, channels, stride=1),
        )
        self.head = nn.Linear(channels, classes)
        self.data_config: dict[str, Any] = {
            "input_size": (3, size, size),
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        }

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of `images` float [B, 3, H, W]: `patch` [B, D, h, w] after its ReLU, `global` [B, D] its mean."""
        patch = self.layers(images)
        return {"global": patch.mean(dim=(2, 3)), "patch": patch}


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
