"""CIFAR ResNet-32, an ordinary network whose training step is timed."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, which strides and pads with zeros where shapes change."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.stride, self.padding = stride, (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


class ResNet32(nn.Module):
    """Three stages of five blocks; double width by default."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        widths = [width] * 6 + [2 * width] * 5 + [4 * width] * 5
        blocks = (BasicBlock(a, b, stride=1 if a == b else 2) for a, b in pairwise(widths))
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 32, 32] -> [N, 10]
        x = F.relu(self.norm(self.conv(x)))
        return self.linear(self.blocks(x).mean((2, 3)))
