"""The network of ``jackpot demo``."""

from torch import Tensor, nn


class DigitsNet(nn.Module):
    """Three convolutions with normalisation and a linear layer, for 8x8 grey images in ten classes."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.features = nn.Sequential(
            _block(1, width, stride=1),
            _block(width, 2 * width, stride=2),
            _block(2 * width, 2 * width, stride=1),
        )
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, 8, 8] -> [N, 10]
        return self.classifier(self.features(x).mean((2, 3)))


def digits_net() -> DigitsNet:
    """Return the network of ``jackpot demo``, untrained: 56,224 weights in four layers."""
    return DigitsNet()


def _block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU())
