"""Weight shapes, layer by layer, of the networks of the paper, and the layers of these and others."""

import math
from itertools import pairwise
from typing import NamedTuple

Shape = tuple[int, ...]


def num_weights(shapes: list[Shape]) -> int:
    return sum(map(math.prod, shapes))


def resnet32(width: int = 32) -> list[Shape]:
    """CIFAR ResNet-32, double width by default, with shortcuts that pad instead of convolving."""
    shapes: list[Shape] = [(width, 3, 3, 3)]
    channels = width
    for stage in (width, 2 * width, 4 * width):
        for _ in range(5):
            shapes += [(stage, channels, 3, 3), (stage, stage, 3, 3)]
            channels = stage
    return [*shapes, (10, channels)]


def vgg19() -> list[Shape]:
    """CIFAR VGG-19: sixteen convolutions and one linear layer."""
    widths = [3] + [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    return [(after, before, 3, 3) for before, after in pairwise(widths)] + [(10, 512)]


def resnet50() -> list[Shape]:
    """ImageNet ResNet-50."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, channels, 1, 1))
            channels = 4 * width
    return [*shapes, (1000, channels)]


def _checked(shapes: list[Shape], layers: int, weights: int) -> list[Shape]:
    if (len(shapes), num_weights(shapes)) != (layers, weights):
        raise AssertionError(
            f"shapes must be {layers} layers of {weights} weights, got {len(shapes)} of {num_weights(shapes)}"
        )
    return shapes


NETWORKS = {
    "ResNet-32 x2": _checked(resnet32(), 32, 1_845_344),
    "VGG-19": _checked(vgg19(), 17, 20_024_000),
    "ResNet-50": _checked(resnet50(), 54, 25_502_912),
}
# The one whose training step is timed.
TRAINED = "ResNet-32 x2"
# Sizes that are no multiple of 32 among them; a run on these proves the machinery and measures nothing.
TINY: dict[str, list[Shape]] = {"tiny": [(8, 3, 3, 3), (16, 8, 3, 3), (10, 16)]}


class Layer(NamedTuple):
    """A layer with a weight, and what goes through it at a time: images, or the tokens of a linear layer."""

    weight: Shape
    batch: int
    size: int = 1  # height and width of an image
    stride: int = 1
    groups: int = 1

    @property
    def is_linear(self) -> bool:
        return len(self.weight) == 2

    @property
    def tokens(self) -> int:
        """The positions of the input."""
        return self.batch * self.size**2

    @property
    def out_tokens(self) -> int:
        return self.batch * math.ceil(self.size / self.stride) ** 2

    @property
    def in_channels(self) -> int:
        return self.weight[1] * self.groups

    @property
    def flops(self) -> int:
        """Of a forward pass; each gradient takes as many."""
        return 2 * self.out_tokens * math.prod(self.weight)

    def __str__(self) -> str:
        if self.is_linear:
            return f"{self.weight[1]} -> {self.weight[0]}, {self.batch} tokens"
        window = "x".join(map(str, self.weight[2:]))
        kind = " depthwise" if self.groups > 1 else ""
        step = f" / {self.stride}" if self.stride > 1 else ""
        return f"{self.in_channels} -> {self.weight[0]}, {window}{kind}{step}, {self.batch} x {self.size}²"


def _conv(outputs: int, inputs: int, window: int, size: int, stride: int = 1) -> Layer:
    return Layer((outputs, inputs, window, window), 256, size, stride)


def _depthwise(channels: int, size: int, stride: int = 1) -> Layer:
    return Layer((channels, 1, 3, 3), 256, size, stride, channels)


def _bottlenecks() -> list[Layer]:
    """The distinct layers of ResNet-50's four stages, which stride in their 3x3 windows."""
    layers = []
    channels, size = 64, 56
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_conv(width, channels, 1, size), _conv(width, width, 3, size, stride)]
        layers += [_conv(4 * width, channels, 1, size, stride)]
        channels, size = 4 * width, size // stride
        layers += [
            _conv(channels, width, 1, size),
            _conv(width, channels, 1, size),
            _conv(width, width, 3, size),
        ]
    return layers


def _mobilenet() -> list[Layer]:
    """The distinct layers of MobileNet-V1's thirteen pairs, depthwise and pointwise (Howard et al., 2017)."""
    layers = []
    channels, size = 32, 112
    for width, stride in (
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        (512, 1),
        (1024, 2),
        (1024, 1),
    ):
        layers.append(_depthwise(channels, size, stride))
        channels, size, inputs = width, size // stride, channels
        layers.append(_conv(channels, inputs, 1, size))
    return layers


def _linears(width: int) -> list[Layer]:
    """The linear layers of a transformer's block, for 1 to 65,536 tokens."""
    weights = [(width, width), (3 * width, width), (4 * width, width), (width, 4 * width)]
    return [Layer(weight, 4**exponent) for exponent in range(9) for weight in weights]


# What is measured, a family at a time; layers that a network repeats stand there once.
FAMILIES: dict[str, list[Layer]] = {
    "transformer, 4096 wide": _linears(4096),
    "ViT-B": _linears(768),
    "ResNet-50": list(dict.fromkeys([_conv(64, 3, 7, 224, 2), *_bottlenecks(), Layer((1000, 2048), 256)])),
    "VGG-19": [
        *(_conv(*shape) for shape in ((64, 3, 3, 32), (64, 64, 3, 32), (128, 64, 3, 16), (128, 128, 3, 16))),
        *(
            _conv(*shape)
            for shape in ((256, 128, 3, 8), (256, 256, 3, 8), (512, 256, 3, 4), (512, 512, 3, 4))
        ),
        _conv(512, 512, 3, 2),
        Layer((10, 512), 256),
    ],
    "ResNet-32 x2": [
        *(_conv(*shape) for shape in ((32, 3, 3, 32), (32, 32, 3, 32), (64, 32, 3, 32, 2), (64, 64, 3, 16))),
        *(_conv(*shape) for shape in ((128, 64, 3, 16, 2), (128, 128, 3, 8))),
        Layer((10, 128), 256),
    ],
    "MobileNet-V1": [_conv(32, 3, 3, 224, 2), *_mobilenet(), Layer((1000, 1024), 256)],
}
TINY_FAMILIES: dict[str, list[Layer]] = {
    "tiny linears": [Layer((16, 16), 4), Layer((8, 16), 64)],
    "tiny convolutions": [
        Layer((4, 3, 3, 3), 2, 6),
        Layer((8, 4, 1, 1), 2, 4),
        Layer((4, 1, 3, 3), 2, 5, 2, 4),
    ],
}
