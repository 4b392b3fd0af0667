"""ImageNet, or any other images, in one folder a class."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch.utils.data import Dataset

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imagenet(
    root: Path | str | None = None,
    *,
    size: int = 224,
    resize: int = 256,
    mean: Sequence[float] = _MEAN,
    std: Sequence[float] = _STD,
    interpolation: str = "bilinear",
) -> tuple[Dataset, Dataset]:
    """Return a training and a test set of images that are read from their files, through torchvision.

    Training images are cropped at random, resized and flipped; test images are resized and cropped in the
    middle. ``Batches`` reads them with as many workers as it is told, and puts them into pinned memory.

    Args:
        root: folder that holds ``train`` and ``val``, each with one folder a class;
            ``imagenet`` in ``$JACKPOT_DATA``, or else in ``data``.
        size: height and width of the images.
        resize: shorter side of a test image before its crop.
        mean, std: of each channel, for values in [0, 1].
        interpolation: "bilinear" or "bicubic".

    Raises:
        ModuleNotFoundError: torchvision is missing.
        FileNotFoundError: a folder is missing.
        ValueError: training and test set have other classes.
    """
    root = Path(os.environ.get("JACKPOT_DATA", "data"), "imagenet") if root is None else Path(root)
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise FileNotFoundError(
                f"imagenet must be in {root} as train and val with one folder a class, got no {root / part}; "
                "JACKPOT_DATA may name another place for the folder imagenet"
            )
    try:
        from torchvision import transforms as t
        from torchvision.datasets import ImageFolder
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        message = 'imagenet needs torchvision; install it with: pip install "jackpot_kernels[models]"'
        raise ModuleNotFoundError(message, name="torchvision") from None
    how = t.InterpolationMode(interpolation)
    to_tensor = [t.ToTensor(), t.Normalize(mean, std)]
    varied = [t.RandomResizedCrop(size, interpolation=how), t.RandomHorizontalFlip()]
    fixed = [t.Resize(resize, interpolation=how), t.CenterCrop(size)]
    train = ImageFolder(str(root / "train"), t.Compose(varied + to_tensor))
    test = ImageFolder(str(root / "val"), t.Compose(fixed + to_tensor))
    if train.classes != test.classes:
        other = sorted(set(train.classes) ^ set(test.classes))[0]
        raise ValueError(f"imagenet must have the same classes in train and val, got {other!r} in one alone")
    return train, test


# As EfficientNet-B4 expects them.
imagenet_380 = partial(imagenet, size=380, resize=384, interpolation="bicubic")
# Pixels in [-1, 1], as the pre-trained weights of MobileNet-V1 and ViT-B/16 expect them.
imagenet_signed = partial(imagenet, mean=(0.5,) * 3, std=(0.5,) * 3)
