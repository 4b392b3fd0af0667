"""Networks that the command line knows by name."""

from jackpot_kernels.models.digits import DigitsNet, digits_net
from jackpot_kernels.models.resnet_cifar import ResNet, resnet20, resnet32
from jackpot_kernels.models.vgg import VGG19, vgg19

__all__ = ["MODELS", "VGG19", "DigitsNet", "ResNet", "digits_net", "resnet20", "resnet32", "vgg19"]

# Each name stands for a callable, and is imported when asked for.
MODELS = {
    "digits": "jackpot_kernels.models.digits:digits_net",
    "resnet20-cifar10": "jackpot_kernels.models.resnet_cifar:resnet20",
    "resnet20-cifar100": "jackpot_kernels.models.resnet_cifar:resnet20_cifar100",
    "resnet32-cifar10": "jackpot_kernels.models.resnet_cifar:resnet32",
    "resnet32-cifar100": "jackpot_kernels.models.resnet_cifar:resnet32_cifar100",
    "vgg19-cifar10": "jackpot_kernels.models.vgg:vgg19",
    "vgg19-cifar100": "jackpot_kernels.models.vgg:vgg19_cifar100",
    "vgg19-narrow-cifar10": "jackpot_kernels.models.vgg:vgg19_narrow",
    "resnet50": "jackpot_kernels.models.external:resnet50",
    "resnet50-pretrained": "jackpot_kernels.models.external:resnet50_pretrained",
    "efficientnet-b4": "jackpot_kernels.models.external:efficientnet_b4",
    "efficientnet-b4-pretrained": "jackpot_kernels.models.external:efficientnet_b4_pretrained",
    "mobilenet-v1": "jackpot_kernels.models.external:mobilenet_v1",
    "mobilenet-v1-pretrained": "jackpot_kernels.models.external:mobilenet_v1_pretrained",
    "vit-b16": "jackpot_kernels.models.external:vit_b16",
    "vit-b16-pretrained": "jackpot_kernels.models.external:vit_b16_pretrained",
    "bert-base": "jackpot_kernels.models.external:bert_base",
    "bert-base-pretrained": "jackpot_kernels.models.external:bert_base_pretrained",
}
