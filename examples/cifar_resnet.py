"""The CIFAR ResNet of He et al. 2016 (arXiv 1512.03385), section 4.2, as a teacher: 6n + 2 layers for 32 x 32 images.

Shortcuts are the paper's option A: identity, with positions subsampled by 2 and new channels filled with zeros where
the size changes. Parameters are named as in the public weights (`conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2},
linear`). Use it as `torch:examples/cifar_resnet.py:resnet56`; the classifier has as many classes as the weights.

Letters: B images, C channels, H and W positions.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut without parameters."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.stride = 1 if channels_in == channels else 2
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.new_channels = channels - channels_in

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x_BCHW)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self._shortcut(x_BCHW))

    def _shortcut(self, x_BCHW: Tensor) -> Tensor:
        if self.stride == 1:
            return x_BCHW
        half = self.new_channels // 2  # before and after the old channels, as the public weights were trained
        return F.pad(x_BCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))


class CifarResNet(nn.Module):
    """Maps images [B, 3, 32, 32] to `global` [B, 64], `patch` [B, 64, 8, 8] and the stages before it.

    `patch` is the last stage after its ReLU, `global` its mean over positions, `layer1` [B, 16, 32, 32] and `layer2`
    [B, 32, 16, 16] are the first two stages.
    """

    data_config = {  # noqa: RUF012  # timm's keys
        "input_size": (3, 32, 32),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks)
        self.linear = nn.Linear(WIDTHS[2], num_classes)

    @property
    def head(self) -> nn.Linear:
        """The classifier on `global`."""
        return self.linear

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        layer1 = self.layer1(F.relu(self.bn1(self.conv1(x_BCHW))))
        layer2 = self.layer2(layer1)
        patch = self.layer3(layer2)
        return {"global": patch.mean((2, 3)), "patch": patch, "layer1": layer1, "layer2": layer2}


def _stage(channels_in: int, channels: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(Block(channels_in, channels), *(Block(channels, channels) for _ in range(blocks - 1)))


def resnet20(num_classes: int = 10, state_dict: Mapping[str, Tensor] | None = None) -> CifarResNet:
    """20 layers; `state_dict`, the weights that will be loaded, decides the number of classes where it is given."""
    return CifarResNet(3, _classes(num_classes, state_dict))


def resnet56(num_classes: int = 10, state_dict: Mapping[str, Tensor] | None = None) -> CifarResNet:
    """56 layers; `state_dict`, the weights that will be loaded, decides the number of classes where it is given."""
    return CifarResNet(9, _classes(num_classes, state_dict))


def _classes(num_classes: int, state_dict: Mapping[str, Tensor] | None) -> int:
    if state_dict is not None and "linear.weight" in state_dict:
        return len(state_dict["linear.weight"])
    return num_classes
