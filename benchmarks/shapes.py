"""Weight shapes, layer by layer, of the networks of the paper."""

import math
from itertools import pairwise

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
