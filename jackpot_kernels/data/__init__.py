"""Data sets that the command line knows by name, and how a search cuts them into batches."""

from jackpot_kernels.data.batches import Batches, DataError, as_dataset
from jackpot_kernels.data.cifar import cifar10, cifar100
from jackpot_kernels.data.digits import digits
from jackpot_kernels.data.imagenet import imagenet
from jackpot_kernels.data.images import Images

__all__ = [
    "DATA",
    "Batches",
    "DataError",
    "Images",
    "as_dataset",
    "cifar10",
    "cifar100",
    "digits",
    "imagenet",
]

# Each name stands for a callable that returns (train, test).
DATA = {
    "digits": "jackpot_kernels.data.digits:digits",
    "cifar10": "jackpot_kernels.data.cifar:cifar10",
    "cifar100": "jackpot_kernels.data.cifar:cifar100",
    "imagenet": "jackpot_kernels.data.imagenet:imagenet",
    "imagenet-380": "jackpot_kernels.data.imagenet:imagenet_380",
    "imagenet-signed": "jackpot_kernels.data.imagenet:imagenet_signed",
}
