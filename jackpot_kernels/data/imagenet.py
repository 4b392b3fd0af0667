"""ImageNet, or any other images, in one folder a class."""

import os
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.data import Dataset

from jackpot_kernels._validate import require_choice
from jackpot_kernels.data.image_files import ImageFiles, View, files_by_class

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imagenet(
    root: Path | str | None = None,
    *,
    size: int = 224,
    resize: int = 256,
    mean: Sequence[float] = _MEAN,
    std: Sequence[float] = _STD,
    interpolation: str = "bilinear",
    loader: str = "auto",
) -> tuple[Dataset, Dataset]:
    """Return a training and a test set of images that are read from their files.

    Training images are cropped at random, resized and flipped; test images are resized and cropped in the
    middle. ``Batches`` reads them with as many workers as it is told: processes that fill pinned memory for
    torchvision, threads for DALI, which decodes and augments on the GPU that the batches are for. The two
    draw other crops from the same seed, and their pixels differ by rounding and, at the rim of a random crop,
    by what stands in for the pixels beyond.

    Args:
        root: folder that holds ``train`` and ``val``, each with one folder a class;
            ``imagenet`` in ``$JACKPOT_DATA``, or else in ``data``.
        size: height and width of the images.
        resize: shorter side of a test image before its crop, ``size`` at least.
        mean, std: of each channel, for values in [0, 1].
        interpolation: "bilinear" or "bicubic".
        loader: "torchvision", "dali", or "auto" for DALI where it is installed.

    Raises:
        ModuleNotFoundError: the loader is not installed.
        FileNotFoundError: a folder is missing, or holds no images.
        ValueError: training and test set have other classes, or an argument is none of the above.
    """
    require_choice("interpolation", interpolation, ("bilinear", "bicubic"))
    require_choice("loader", loader, ("auto", "torchvision", "dali"))
    if resize < size:
        raise ValueError(f"resize must be at least size, which is {size}, got {resize}")
    root = Path(os.environ.get("JACKPOT_DATA", "data"), "imagenet") if root is None else Path(root)
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise FileNotFoundError(
                f"imagenet must be in {root} as train and val with one folder a class, got no {root / part}; "
                "JACKPOT_DATA may name another place for the folder imagenet"
            )
    train, test = files_by_class(root / "train"), files_by_class(root / "val")
    if train.keys() != test.keys():
        other = min(train.keys() ^ test.keys())
        raise ValueError(f"imagenet must have the same classes in train and val, got {other!r} in one alone")
    view = View(size, resize, mean, std, interpolation)
    build = _with_dali if loader == "dali" or (loader == "auto" and _has_dali()) else _with_torchvision
    return build(train, view, augmented=True), build(test, view, augmented=False)


def _has_dali() -> bool:
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def _with_dali(classes: dict[str, list[str]], view: View, augmented: bool) -> Dataset:
    try:
        from jackpot_kernels.data.dali import DaliImages
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "nvidia":
            raise
        message = 'loader "dali" needs DALI; install it with: pip install nvidia-dali-cuda130 (or -cuda120)'
        raise ModuleNotFoundError(message, name=error.name) from None
    return DaliImages(*_flat(classes), view, augmented=augmented)


def _with_torchvision(classes: dict[str, list[str]], view: View, augmented: bool) -> Dataset:
    try:
        from torchvision import transforms as t
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        message = 'imagenet needs torchvision; install it with: pip install "jackpot_kernels[models]"'
        raise ModuleNotFoundError(message, name="torchvision") from None
    how = t.InterpolationMode(view.interpolation)
    if augmented:
        cut = [t.RandomResizedCrop(view.size, interpolation=how), t.RandomHorizontalFlip()]
    else:
        cut = [t.Resize(view.resize, interpolation=how), t.CenterCrop(view.size)]
    transform = t.Compose([*cut, t.ToTensor(), t.Normalize(view.mean, view.std)])
    return ImageFiles(*_flat(classes), transform)


def _flat(classes: dict[str, list[str]]) -> tuple[list[str], torch.Tensor]:
    """Return the files of all classes, and their labels: the first class has 0."""
    paths = [path for files in classes.values() for path in files]
    counts = torch.tensor([len(files) for files in classes.values()])
    return paths, torch.arange(len(classes)).repeat_interleave(counts)


# As EfficientNet-B4 expects them.
imagenet_380 = partial(imagenet, size=380, resize=384, interpolation="bicubic")
# Pixels in [-1, 1], as the pre-trained weights of MobileNet-V1 and ViT-B/16 expect them.
imagenet_signed = partial(imagenet, mean=(0.5,) * 3, std=(0.5,) * 3)
