"""VGG-19 for 32x32 images, with batch normalisation and one linear layer."""

from functools import partial

from torch import Tensor, nn

from jackpot_kernels.models.kaiming import kaiming_

# Channels of the convolutions between the poolings, at width 1.
_STAGES = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


class VGG19(nn.Module):
    """Sixteen 3x3 convolutions without bias, maximum pooling between the stages, and one linear layer.

    Args:
        classes: number of outputs.
        width: factor on the 64, 128, 256 and 512 channels.

    Raises:
        ValueError: ``width`` leaves no whole number of channels.
    """

    def __init__(self, classes: int = 10, width: float = 1) -> None:
        super().__init__()
        if width <= 0 or 64 * width % 1:
            raise ValueError(f"width must give a whole number of 64 * width channels, got {width}")
        layers: list[nn.Module] = []
        channels = 3
        for stage in _STAGES:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for wide in stage:
                wide = int(wide * width)
                conv = nn.Conv2d(channels, wide, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
                channels = wide
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)
        kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 32, 32] -> [N, classes]
        return self.classifier(self.features(x).mean((2, 3)))


def vgg19(classes: int = 10, width: float = 1) -> VGG19:
    """Return VGG-19, untrained: 20,024,000 weights in seventeen layers."""
    return VGG19(classes, width)


vgg19_cifar100 = partial(vgg19, classes=100)
# A quarter of the channels, for a search on a few CPU cores.
vgg19_narrow = partial(vgg19, width=1 / 4)
