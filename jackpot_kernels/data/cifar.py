"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from their standard archives, unpacked."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path

import numpy as np
import torch

from jackpot_kernels.data.images import Images
from jackpot_kernels.data.pickled import read_pickled

# Those of CIFAR-10, which the authors use for CIFAR-100 as well.
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_SOURCE = "https://www.cs.toronto.edu/~kriz"
_IMAGE_BYTES = 3 * 32 * 32

Arrays = tuple[np.ndarray, np.ndarray]  # uint8 images [N, 3072], labels [N]


@dataclass(frozen=True)
class Layout:
    """An archive: its folder, the md5 sums of its files, and how the bytes of one are read."""

    archive: str
    folder: str
    train: Mapping[str, str]
    test: Mapping[str, str]
    read: Callable[[bytes], Arrays]


def read_binary(content: bytes, label_bytes: int) -> Arrays:
    """Return images and labels of records that begin with their labels, the last of which is the finest."""
    records = np.frombuffer(content, np.uint8).reshape(-1, label_bytes + _IMAGE_BYTES)
    return records[:, label_bytes:], records[:, label_bytes - 1]


def read_python(content: bytes, label_key: bytes) -> Arrays:
    """Return images and labels of a pickled dictionary, of which nothing is executed."""
    batch = read_pickled(content)
    return batch[b"data"], np.array(batch[label_key])


CIFAR10 = (
    Layout(
        archive="cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        train={
            "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
            "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
            "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
            "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
            "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        },
        test={"test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"},
        read=lambda content: read_binary(content, label_bytes=1),
    ),
    Layout(
        archive="cifar-10-python.tar.gz",
        folder="cifar-10-batches-py",
        train={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        test={"test_batch": "40351d587109b95175f43aff81a1287e"},
        read=lambda content: read_python(content, b"labels"),
    ),
)
CIFAR100 = (
    Layout(
        archive="cifar-100-binary.tar.gz",
        folder="cifar-100-binary",
        train={"train.bin": "6172c7755cfe09b2fe270c85cebc1b15"},
        test={"test.bin": "4499cfba6c016c1be1438163640a0898"},
        read=lambda content: read_binary(content, label_bytes=2),
    ),
    Layout(
        archive="cifar-100-python.tar.gz",
        folder="cifar-100-python",
        train={"train": "16019d7e3df5f24257cddd939b257f8d"},
        test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        read=lambda content: read_python(content, b"fine_labels"),
    ),
)


def cifar10(root: Path | str | None = None, layouts: tuple[Layout, ...] = CIFAR10) -> tuple[Images, Images]:
    """Return CIFAR-10 as (train, test): 50,000 and 10,000 images of 32x32 pixels in ten classes.

    Args:
        root: folder that holds an archive's folder, binary or python; ``$JACKPOT_DATA``, or else ``data``.
        layouts: the archives to look for.

    Raises:
        FileNotFoundError: the data set or one of its files is missing.
        ValueError: a file is damaged.
    """
    return _load("cifar10", root, layouts)


def cifar100(root: Path | str | None = None, layouts: tuple[Layout, ...] = CIFAR100) -> tuple[Images, Images]:
    """Return CIFAR-100 with its hundred fine classes; all else is as in ``cifar10``, mean and std too."""
    return _load("cifar100", root, layouts)


def _load(name: str, root: Path | str | None, layouts: tuple[Layout, ...]) -> tuple[Images, Images]:
    root = Path(os.environ.get("JACKPOT_DATA", "data") if root is None else root)
    for layout in layouts:
        if (root / layout.folder).is_dir():
            return _images(root, layout, layout.train), _images(root, layout, layout.test)
    folders = " or ".join(str(root / layout.folder) for layout in layouts)
    archives = " or ".join(f"{_SOURCE}/{layout.archive}" for layout in layouts)
    raise FileNotFoundError(
        f"{name} must be in {folders}, got neither: unpack {archives} in {root}, "
        "or set JACKPOT_DATA to the folder that holds it"
    )


def _images(root: Path, layout: Layout, files: Mapping[str, str]) -> Images:
    parts = [layout.read(_content(root, layout, name, wanted)) for name, wanted in files.items()]
    images = np.concatenate([images for images, _ in parts]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([labels for _, labels in parts]).astype(np.int64)
    return Images(torch.from_numpy(images), torch.from_numpy(labels), _MEAN, _STD)


def _content(root: Path, layout: Layout, name: str, wanted: str) -> bytes:
    path = root / layout.folder / name
    again = f"unpack {_SOURCE}/{layout.archive} in {root} again"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: {again}") from None
    got = md5(content, usedforsecurity=False).hexdigest()
    if got != wanted:
        raise ValueError(f"{path} must have the md5 sum {wanted}, got {got}: {again}")
    return content
