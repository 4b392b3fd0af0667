import math
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jackpot_kernels as jk
from benchmarks.shapes import NETWORKS
from benchmarks.shapes import vgg19 as vgg19_shapes
from jackpot_kernels.models import MODELS, VGG19, DigitsNet, ResNet, digits_net, resnet20, resnet32, vgg19
from jackpot_kernels.models.resnet_cifar import BasicBlock

OURS = [name for name in MODELS if name.startswith(("digits", "resnet20", "resnet32", "vgg19"))]


def build(name):
    module, _, function = MODELS[name].partition(":")
    return getattr(import_module(module), function)()


def shapes(model):
    """The maskable weights in the order of the modules."""
    return [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def test_networks_of_the_paper_have_its_shapes():
    assert shapes(resnet32()) == NETWORKS["ResNet-32 x2"]
    assert shapes(vgg19()) == NETWORKS["VGG-19"]
    assert resnet32(classes=100).linear.weight.shape == (100, 128)


@pytest.mark.parametrize(
    ("name", "weights", "layers", "classes"),
    [
        ("digits", 56_224, 4, 10),
        ("resnet20-cifar10", 268_336, 20, 10),
        ("resnet20-cifar100", 268_336 + 90 * 64, 20, 100),
        ("resnet32-cifar10", 1_845_344, 32, 10),
        ("resnet32-cifar100", 1_845_344 + 90 * 128, 32, 100),
        ("vgg19-cifar10", 20_024_000, 17, 10),
        ("vgg19-cifar100", 20_024_000 + 90 * 512, 17, 100),
        ("vgg19-narrow-cifar10", 1_252_784, 17, 10),
    ],
)
def test_named_networks_have_their_weights(name, weights, layers, classes):
    model = build(name).eval()
    sizes = [layer.weight.numel() for layer in jk.masked_layers(jk.convert(model)).values()]
    assert (sum(sizes), len(sizes)) == (weights, layers)
    image = (1, 8, 8) if name == "digits" else (3, 32, 32)
    assert model(torch.zeros(2, *image)).shape == (2, classes)


def test_every_network_of_ours_is_counted():
    counted = test_named_networks_have_their_weights.pytestmark[0].args[1]
    assert [row[0] for row in counted] == OURS


def test_narrow_vgg_has_a_quarter_of_the_channels():
    narrow = [shape[0] for shape in shapes(vgg19(width=1 / 4))]
    assert narrow == [shape[0] // 4 for shape in vgg19_shapes()[:-1]] + [10]


def test_shortcut_strides_and_pads_with_zeros():
    block = BasicBlock(4, 8, stride=2).eval()
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    for row in range(3):
        for column in range(3):
            expected[:, 2:6, row, column] = x[:, :, 2 * row, 2 * column]
    assert torch.equal(block(x), expected)
    plain = BasicBlock(4, 4, stride=1).eval()
    nn.init.zeros_(plain.norm2.weight)
    assert torch.equal(plain(x), x)


def test_resnet_computes_what_its_layers_say():
    model = resnet20().eval()
    x = torch.randn(2, 3, 32, 32)
    out = F.relu(model.norm(model.conv(x)))
    for block in model.blocks:
        inner = block.norm2(block.conv2(F.relu(block.norm1(block.conv1(out)))))
        added = inner.shape[1] - out.shape[1]
        short = torch.zeros_like(inner)
        short[:, added // 2 : added // 2 + out.shape[1]] = out[:, :, :: block.stride, :: block.stride]
        out = F.relu(inner + short)
    assert [block.stride for block in model.blocks] == [1, 1, 1, 2, 1, 1, 2, 1, 1]
    assert torch.allclose(model(x), model.linear(F.adaptive_avg_pool2d(out, 1).flatten(1)), atol=1e-5)


def test_vgg_pools_four_times():
    model = vgg19(width=1 / 16).eval()
    sizes = []
    for layer in model.features:
        layer.register_forward_hook(lambda layer, args, out: sizes.append((type(layer), out.shape[-1])))
    model(torch.randn(1, 3, 32, 32))
    convolutions = [size for kind, size in sizes if kind is nn.Conv2d]
    assert convolutions == [32] * 2 + [16] * 2 + [8] * 4 + [4] * 4 + [2] * 4
    assert sum(kind is nn.MaxPool2d for kind, _ in sizes) == 4


@pytest.mark.parametrize("build", [resnet32, lambda: vgg19(width=1 / 2)], ids=["resnet32", "vgg19"])
def test_weights_start_as_he_et_al_draw_them(build):
    for layer in build().modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            tolerance = 5 / math.sqrt(layer.weight.numel())
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=tolerance)
            assert layer.bias is None or not layer.bias.any()


@pytest.mark.parametrize("depth", [2, 3, 21, 33])
def test_depth_must_fit_the_blocks(depth):
    with pytest.raises(ValueError, match=rf"depth must be 6 n \+ 2 for n blocks a stage, got {depth}"):
        ResNet(depth)


@pytest.mark.parametrize("width", [0, -1, 0.3])
def test_width_must_leave_whole_channels(width):
    with pytest.raises(
        ValueError, match=f"width must give a whole number of 64 . width channels, got {width}"
    ):
        VGG19(width=width)


def test_the_digits_network_is_where_it_was():
    assert isinstance(digits_net(), DigitsNet)
    assert list(digits_net().state_dict()) == list(DigitsNet(width=4).state_dict())
