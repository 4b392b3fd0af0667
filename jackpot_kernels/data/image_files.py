"""Images in files, one folder a class."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from jackpot_kernels.data.batches import DataError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class View(NamedTuple):
    """What a network gets to see of an image; ``imagenet`` says what the names mean."""

    size: int
    resize: int
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str


def files_by_class(folder: Path) -> dict[str, list[str]]:
    """Return the image files of each class, at any depth of its folder; both in order, as torchvision has it.

    Raises:
        FileNotFoundError: when a class has no image, or there is no class.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    classes = {
        name: [
            os.path.join(at, file)
            for at, _, files in sorted(os.walk(folder / name, followlinks=True))
            for file in sorted(files)
            if file.lower().endswith(_SUFFIXES)
        ]
        for name in names
    }
    empty = next((folder / name for name in names if not classes[name]), None if names else folder)
    if empty:
        raise FileNotFoundError(f"imagenet must have images in the folder of each class, got none in {empty}")
    return classes


class ImageFiles(Dataset):
    """Labelled image files, each read and transformed when it is asked for.

    Args:
        paths: of the files.
        labels: int64.  # [N]
        transform: from a PIL image in RGB to a tensor.
    """

    def __init__(self, paths: Sequence[str], labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self._paths, self._labels, self._transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        path = self._paths[index]
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB")
        except (OSError, SyntaxError) as error:  # the latter from a damaged PNG
            raise DataError(f"images must be whole, got {path} ({error})") from None
        return self._transform(pixels), self._labels[index]
