"""How a search cuts a data set into batches."""

import random
import signal
from collections.abc import Iterator
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from jackpot_kernels.data.images import Images


class DataError(ValueError):
    """A sample that cannot be read or does not fit the network, met while batches are made."""

    def __init__(self, sentence: str) -> None:
        # From a worker process comes its whole traceback, which ends with the sentence.
        super().__init__(sentence.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


def as_dataset(value: Any, name: str) -> Dataset:
    """Return ``value`` as a data set of (input, label) pairs.

    Args:
        value: a map-style ``Dataset``, or a pair of tensors (inputs, labels).
        name: what an error calls it.

    Raises:
        TypeError: ``value`` is neither.
        ValueError: it is empty, or inputs and labels differ in number.
    """
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, Tensor) for v in value):
        inputs, labels = value
        if labels.shape != inputs.shape[:1]:
            raise ValueError(
                f"{name} must hold one label an input, got {list(inputs.shape)} and {list(labels.shape)}"
            )
        value = TensorDataset(inputs, labels)
    if (
        not hasattr(value, "__getitem__")
        or not hasattr(value, "__len__")
        or isinstance(value, IterableDataset)
    ):
        kind = type(value).__name__
        raise TypeError(
            f"{name} must be a map-style Dataset or a pair of tensors (inputs, labels), got {kind}"
        )
    if len(value) == 0:
        raise ValueError(f"{name} must hold at least one sample, got an empty {type(value).__name__}")
    sample = value[0]
    if not isinstance(sample, tuple | list) or len(sample) != 2 or not isinstance(sample[0], Tensor):
        raise TypeError(f"{name} must yield pairs (input tensor, label), got {_describe(sample)}")
    if not isinstance(sample[1], Tensor | Number) and not hasattr(sample[1], "__array__"):
        raise TypeError(f"{name} must yield labels that are numbers, got {_describe(sample)}")
    return value


class SelfBatching(Dataset):
    """A data set that makes its batches itself, instead of one sample at a time.

    Attributes:
        labels: of all samples, int64 on the host.  # [N]
    """

    labels: Tensor

    def batches(
        self,
        order: Tensor,
        batch_size: int,
        device: torch.device,
        seed: int,
        start: int = 0,
        workers: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the samples of ``order`` in batches, from batch ``start`` on.

        Args:
            order: indices; the last batch may have fewer.  # [N]
            seed: of what is drawn, if anything is.
            workers: threads or processes that help.
        """
        raise NotImplementedError


class Batches:
    """A data set in batches on one device: in order, or in the order that (seed, epoch) gives.

    The tensors of a ``TensorDataset`` are moved to the device once and indexed there; everything else goes
    through a ``DataLoader``, unless it makes its batches itself. Order and augmentation depend on (seed,
    epoch, index) alone: neither device and number of workers nor an interruption changes them. ``Images`` are
    augmented in shuffled batches only; what other data sets do to a sample may draw from ``torch`` and from
    ``random``.
    """

    def __init__(
        self, data: Dataset, batch_size: int, device: torch.device, *, seed: int = 0, workers: int = 0
    ):
        self.batch_size = batch_size
        self.device = device
        self._seed, self._workers = seed, workers
        self._count = len(data)  # type: ignore[arg-type]
        self._classes: int | None = None
        if isinstance(data, Images):
            data = data.to(device)
        elif isinstance(data, TensorDataset):
            data = TensorDataset(*(tensor.to(device) for tensor in data.tensors))
        self._data = data

    @property
    def labels(self) -> Tensor | None:
        """All labels, where they are held in a tensor."""
        if isinstance(self._data, TensorDataset):
            return self._data.tensors[1]
        return self._data.labels if isinstance(self._data, SelfBatching) else None

    def require_classes(self, classes: int, labels: Tensor) -> None:
        """Check once that labels are in [0, ``classes``): all of them, or those of the batch at hand.

        Where a data set gives its labels sample by sample, those of later batches are checked as they come,
        before they leave the host, where nothing has to wait for the answer.

        Raises:
            DataError: when they are not, or are not one int64 a sample.
        """
        if classes == self._classes:
            return
        _require_labels(labels if self.labels is None else self.labels, classes)
        self._classes = classes

    @property
    def shuffled_batches(self) -> int:
        """Number of batches of a shuffled epoch: full ones only, lest statistics rest on a few samples."""
        return max(1, self._count // self.batch_size)

    def shuffled(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from batch ``start`` on."""
        seed = self._seed * 1_000_003 + epoch
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self._count, generator=generator)
        order = order[: self.shuffled_batches * self.batch_size]
        if isinstance(self._data, Images):
            # Drawn for the whole epoch, so that a batch is the same wherever the epoch begins.
            draws = self._data.draw(len(order), generator)
            return self._augmented(self._data, order, draws, start)
        return self._batches(order, seed, start)

    def ordered(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every sample once, in the order of the data set."""
        return self._batches(torch.arange(self._count), self._seed, start=0)

    def sampled(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``count`` batches, the same every time, or every sample in order where that is no more.

        They come from all over the data set, which may be stored class by class.
        """
        if self._count <= count * self.batch_size:
            return self.ordered()
        order = torch.randperm(self._count, generator=torch.Generator().manual_seed(self._seed))
        return self._batches(order[: count * self.batch_size], self._seed, start=0)

    def _batches(self, order: Tensor, seed: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        if not isinstance(self._data, TensorDataset):
            yield from self._loaded(order, seed, start)
            return
        inputs, labels = self._data.tensors
        for index in self._split(order)[start:]:
            batch = inputs[index]
            yield self._data.normalized(batch) if isinstance(self._data, Images) else batch, labels[index]

    def _augmented(
        self, data: Images, order: Tensor, draws: Tensor, start: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = data.tensors
        for index, draw in zip(self._split(order)[start:], self._split(draws)[start:], strict=True):
            yield data.augmented(images[index], draw), labels[index]

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return what belongs to each batch, moved to the device in one go."""
        return values.to(self.device).split(self.batch_size)

    def _loaded(self, order: Tensor, seed: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self._data, SelfBatching):
            yield from self._data.batches(
                order, self.batch_size, self.device, seed, start=start, workers=self._workers
            )
            return
        loader = DataLoader(
            _SeededItems(self._data, seed),
            batch_sampler=[index.tolist() for index in order.split(self.batch_size)[start:]],
            num_workers=self._workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(seed),
            worker_init_fn=_ignore_interrupts,
        )
        for inputs, labels in loader:
            layout = torch.channels_last if inputs.dim() == 4 else torch.preserve_format
            if self._classes is not None:
                _require_labels(labels, self._classes)
            inputs = inputs.to(self.device, non_blocking=True, memory_format=layout)
            yield inputs, labels.to(self.device, non_blocking=True)


class _SeededItems(Dataset):
    """Items whose augmentation is drawn from (seed, index), leaving the caller's generators as they were."""

    def __init__(self, data: Dataset, seed: int):
        self._data, self._seed = data, seed

    def __getitem__(self, index: int) -> Any:
        outer = torch.get_rng_state(), random.getstate()
        seed = self._seed * 1_000_000_007 + index
        torch.default_generator.manual_seed(seed % 2**63)
        random.seed(seed)
        try:
            return self._data[index]
        finally:
            torch.set_rng_state(outer[0])
            random.setstate(outer[1])


def _require_labels(labels: Tensor, classes: int) -> None:
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise DataError(f"labels must be one int64 a sample, got {labels.dtype} {list(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        wanted = f"labels must be in [0, {classes}) for a model with {classes} outputs"
        raise DataError(f"{wanted}, got {low if low < 0 else high}")


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which the terminal sends to every process, to the one that saves the search."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _describe(sample: Any) -> str:
    if isinstance(sample, tuple | list):
        return "(" + ", ".join(type(part).__name__ for part in sample) + ")"
    return type(sample).__name__
