"""Image files that NVIDIA DALI reads, decodes and augments, on the GPU that their batches are for."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali import math as dali_math
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor

from jackpot_kernels.data.batches import DataError, SelfBatching
from jackpot_kernels.data.image_files import View

# What torchvision crops at random: a share of the area, the ratio of width to height, and how often it tries.
_AREA, _RATIO, _ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10
_INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


class Draws(NamedTuple):
    """What augments a batch of images.

    Args:
        sides: height and width of the crops to try, for an image of area 1.  # float32 [N, 2, attempts]
        place: of the crop between the first and the last row and column, in [0, 1).  # float32 [N, 2]
        flipped: 1 for an image that is mirrored.  # int32 [N]
    """

    sides: Tensor
    place: Tensor
    flipped: Tensor


def draw(count: int, seed: int) -> Draws:
    """Draw what augments ``count`` images."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    area, ratio = torch.rand(2, count, _ATTEMPTS, generator=generator)
    area = _AREA[0] + (_AREA[1] - _AREA[0]) * area
    ratio = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** ratio
    place = torch.rand(count, 2, generator=generator)
    flipped = torch.randint(2, (count,), dtype=torch.int32, generator=generator)
    return Draws(torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 1), place, flipped)


class DaliImages(SelfBatching):
    """Labelled image files, cut and normalised as torchvision would.

    Args:
        paths: of the files.
        labels: int64.  # [N]
        view: what becomes of an image.
        augmented: whether images are cropped and mirrored at random, or cropped in the middle.
    """

    def __init__(self, paths: Sequence[str], labels: Tensor, view: View, *, augmented: bool) -> None:
        self._paths, self.labels, self._view, self._augmented = paths, labels, view, augmented

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        seed = int(torch.randint(2**62, ())) if self._augmented else 0
        order = torch.tensor([range(len(self))[index]])
        ((inputs, labels),) = self.batches(order, 1, torch.device("cpu"), seed)
        return inputs[0], labels[0]

    def batches(
        self,
        order: Tensor,
        batch_size: int,
        device: torch.device,
        seed: int,
        start: int = 0,
        workers: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches as ``SelfBatching`` says; seed and number of a batch decide how it is augmented.

        Raises:
            DataError: a file is no image.
        """
        split = order.split(batch_size)[start:]

        def source() -> Iterator[tuple[Any, ...]]:
            for number, index in enumerate(split, start):
                paths = [np.frombuffer(self._paths[i].encode(), np.uint8) for i in index.tolist()]
                draws = draw(len(paths), seed * 1_000_003 + number) if self._augmented else ()
                yield paths, *(part.numpy() for part in draws)

        pipeline = Pipeline(batch_size, max(1, workers), _device_id(device))
        with pipeline:
            path, *drawn = fn.external_source(source(), num_outputs=4 if self._augmented else 1)
            pipeline.set_outputs(self._inputs(fn.io.file.read(path), drawn, device.type == "cuda"))
        iterator = DALIGenericIterator(pipeline, ["inputs"], prepare_first_batch=False)
        for index in split:
            try:
                (batch,) = next(iterator)
            except RuntimeError as error:
                self._require_images(index, error)
                raise
            yield batch["inputs"].permute(0, 3, 1, 2), self.labels[index].to(device, non_blocking=True)

    def _require_images(self, index: Tensor, error: RuntimeError) -> None:
        """Name the file among those of a failed batch that is at fault, by decoding each as a whole."""
        if len(index) == 1:
            raise DataError(f"images must be whole, got {self._paths[int(index)]}") from error
        alone = DaliImages(self._paths, self.labels, self._view, augmented=False)
        for i in index.tolist():
            alone[i]

    def _inputs(self, encoded: Any, drawn: Sequence[Any], on_gpu: bool) -> Any:
        """Build what makes the bytes of a file an image as the network wants it.  # [size, size, C]"""
        view = self._view
        # As other readers have it: turned no other way than it lies, colours smoothed between the pixels.
        decoded = {
            "device": "mixed" if on_gpu else "cpu",
            "adjust_orientation": False,
            "jpeg_fancy_upsampling": True,
        }
        resized = {"interp_type": _INTERPOLATIONS[view.interpolation], "antialias": True}
        shape = fn.peek_image_shape(encoded, adjust_orientation=False)[:2]
        flipped: Any = 0
        if self._augmented:
            *crops, flipped = drawn
            start, window = _random_window(shape, *crops)
            image = fn.decoders.image_slice(encoded, start=start, shape=window, axes=(0, 1), **decoded)
            image = fn.resize(image, size=(view.size, view.size), **resized)
        else:
            scaled = shape * view.resize // dali_math.min(shape[0], shape[1])
            image = fn.decoders.image(encoded, **decoded)
            image = fn.resize(image, size=fn.cast(scaled, dtype=types.FLOAT), **resized)
            start = fn.cast(_half(scaled - view.size), dtype=types.INT32)
            image = fn.slice(image, start=start, shape=(view.size, view.size), axes=(0, 1))
        return fn.crop_mirror_normalize(
            image,
            mirror=flipped,
            mean=[255 * value for value in view.mean],
            std=[255 * value for value in view.std],
            output_layout="HWC",
        )


def _random_window(shape: Any, sides: Any, place: Any) -> tuple[Any, Any]:
    """Build start and shape of the first crop that fits, or else of the largest in the middle.  # [2] each"""
    order = types.Constant(np.arange(_ATTEMPTS, dtype=np.int32))
    sides = dali_math.floor(sides * dali_math.sqrt(shape[0] * shape[1]) + 0.5)  # [2, attempts]
    fits = (sides[0] <= shape[0]) & (sides[1] <= shape[1])
    first = fn.reductions.min(order + _ATTEMPTS * (1 - fits))
    none = first >= _ATTEMPTS
    # Neither side more than 4/3 of the other, rounded.
    largest = dali_math.min(shape, (8 * fn.stack(shape[1], shape[0]) + 3) // 6)
    window = none * largest + fn.reductions.sum((order == first) * sides, axes=1)
    slack = shape - window
    start = dali_math.floor(none * slack / 2 + (1 - none) * place * (slack + 1))
    return fn.cast(start, dtype=types.INT32), fn.cast(window, dtype=types.INT32)


def _half(number: Any) -> Any:
    """Build half of a whole number, rounded to even."""
    return (number + (number // 2 & 1)) // 2


def _device_id(device: torch.device) -> int | None:
    """Return the number of a GPU, None for the CPU."""
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
