"""Residual networks for 32x32 images (He et al., 2016), with shortcuts that hold no weight."""

from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from jackpot_kernels.models.kaiming import kaiming_


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, which strides and pads with zeros where shapes change (option A)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.stride, self.padding = stride, (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = x
        if self.padding:
            shortcut = x[:, :, :: self.stride, :: self.stride]
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + shortcut)


class ResNet(nn.Module):
    """Three stages of basic blocks, ``16 * width`` channels wide in the first, doubling in each other.

    Args:
        depth: number of layers with weights, 6 n + 2 for n blocks a stage.
        classes: number of outputs.
        width: factor on the 16, 32 and 64 channels of He et al.

    Raises:
        ValueError: ``depth`` is no such number.
    """

    def __init__(self, depth: int = 20, classes: int = 10, width: int = 1) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth must be 6 n + 2 for n blocks a stage, got {depth}")
        first = 16 * width
        self.conv = nn.Conv2d(3, first, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(first)
        widths = [first] * (blocks + 1) + [2 * first] * blocks + [4 * first] * blocks
        self.blocks = nn.Sequential(
            *(BasicBlock(a, b, stride=1 if a == b else 2) for a, b in pairwise(widths))
        )
        self.linear = nn.Linear(4 * first, classes)
        kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 32, 32] -> [N, classes]
        x = F.relu(self.norm(self.conv(x)))
        return self.linear(self.blocks(x).mean((2, 3)))


def resnet20(classes: int = 10, width: int = 1) -> ResNet:
    """Return ResNet-20, untrained: 268,336 weights in twenty layers."""
    return ResNet(20, classes, width)


def resnet32(classes: int = 10, width: int = 2) -> ResNet:
    """Return ResNet-32 of double width, as the paper has it, untrained: 1,845,344 weights in 32 layers."""
    return ResNet(32, classes, width)


resnet20_cifar100 = partial(resnet20, classes=100)
resnet32_cifar100 = partial(resnet32, classes=100)
