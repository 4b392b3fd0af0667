"""Images held as bytes, normalised when they are read and augmented a batch at a time."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from jackpot_kernels._validate import require_dtype, require_shape


class Images(TensorDataset):
    """Labelled uint8 images: an ordinary data set of (normalised image, label).

    ``Batches`` holds the bytes on its device and augments shuffled batches there, all images at once: a crop
    of the image padded with zeros, and a flip from left to right. Every other way to read them, a ``Subset``
    among them, leaves them as they are; ``subset`` keeps the augmentation.

    Args:
        images: uint8.  # [N, C, H, W]
        labels: int64.  # [N]
        mean, std: of each channel, for values in [0, 1].
        crop_padding: rows and columns of zeros on each side; 0 for no crop.
        flip: whether every other image is mirrored.

    Raises:
        TypeError, ValueError: arguments do not fit each other.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        crop_padding: int = 4,
        flip: bool = True,
    ) -> None:
        require_dtype("images", images, torch.uint8)
        require_dtype("labels", labels, torch.int64)
        if images.dim() != 4:
            raise ValueError(f"images must have shape [N, C, H, W], got {list(images.shape)}")
        require_shape("labels", labels, images.shape[:1])
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != images.shape[1]:
                raise ValueError(
                    f"{name} must have a value for each of {images.shape[1]} channels, got {len(values)}"
                )
        if min(std) <= 0:
            raise ValueError(f"std must be positive, got {tuple(std)}")
        if crop_padding < 0:
            raise ValueError(f"crop_padding must not be negative, got {crop_padding}")
        super().__init__(images, labels)
        self.mean, self.std = tuple(mean), tuple(std)
        self.crop_padding, self.flip = crop_padding, flip
        self._center = 255 * torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        self._scale = 255 * torch.tensor(self.std, device=images.device).view(-1, 1, 1)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.tensors
        return self.normalized(images[index]), labels[index]

    def to(self, device: torch.device | str) -> "Images":
        """Return the same images on a device."""
        images, labels = self.tensors
        return self._like(images.to(device), labels.to(device))

    def subset(self, count: int, seed: int | None = None) -> "Images":
        """Return ``count`` of the images, in their order: the first, or with a seed as many of each class.

        Where ``count`` is no multiple of the number of classes, the lower classes get one image more.

        Raises:
            ValueError: when there are not so many, of each class with a seed.
        """
        images, labels = self.tensors
        if not 1 <= count <= len(labels):
            raise ValueError(f"count must be in [1, {len(labels)}], got {count}")
        if seed is None:
            return self._like(images[:count], labels[:count])
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
        members = [order[labels[order] == label] for label in labels.unique()]
        share, extra = divmod(count, len(members))
        parts = [of_class[: share + (i < extra)] for i, of_class in enumerate(members)]
        chosen = torch.cat(parts).sort().values
        if len(chosen) < count:
            raise ValueError(
                f"count must ask {len(members)} classes for no more images than each has, got {count}"
            )
        return self._like(images[chosen], labels[chosen])

    def normalized(self, images: Tensor) -> Tensor:
        """Return bytes as float32 of zero mean and unit deviation; batches come out channels_last."""
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        return (images.float() - self._center) / self._scale

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw upper row, left column and flip of ``count`` images, on the CPU.  # [count, 3]"""
        corner = torch.randint(2 * self.crop_padding + 1, (count, 2), generator=generator)
        flipped = torch.randint(1 + self.flip, (count, 1), generator=generator)
        return torch.cat([corner, flipped], dim=1)

    def augmented(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return a batch of bytes cropped and flipped as drawn, and normalised.  # [N, C, H, W], [N, 3]"""
        top, left, flipped = draws.unbind(1)
        count, _, height, width = images.shape
        steps = torch.arange(max(count, height, width), device=images.device)
        rows = top[:, None] + steps[:height]  # [N, H]
        columns = steps[:width].expand(count, width)
        columns = left[:, None] + torch.where(flipped[:, None] == 1, width - 1 - columns, columns)  # [N, W]
        padded = F.pad(images, [self.crop_padding] * 4)
        # Indices around a slice put its dimension last: the pixels come as channels_last has them.
        pixels = padded[steps[:count, None, None], :, rows[:, :, None], columns[:, None, :]]  # [N, H, W, C]
        return self.normalized(pixels.permute(0, 3, 1, 2))

    def _like(self, images: Tensor, labels: Tensor) -> "Images":
        return Images(images, labels, self.mean, self.std, crop_padding=self.crop_padding, flip=self.flip)
