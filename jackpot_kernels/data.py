"""Data sets, and how a search cuts them into batches."""

import random
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

_DIGITS_TEST = 500


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return scikit-learn's handwritten digits as (train, test): 1,297 and 500 images, always the same.

    Returns:
        Two data sets of float32 images in [0, 1] and int64 labels.  # [N, 1, 8, 8], [N]
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        message = 'the digits need scikit-learn; install it with: pip install "jackpot_kernels[cli]"'
        raise ModuleNotFoundError(message, name="sklearn") from None
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:_DIGITS_TEST], order[_DIGITS_TEST:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


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
    return value


class Batches:
    """A data set in batches on one device: in order, or in the order that (seed, epoch) gives.

    The tensors of a ``TensorDataset`` are moved to the device once and indexed there; everything else goes
    through a ``DataLoader``. Order and augmentation depend on (seed, epoch, index) alone: neither the number
    of workers nor an interruption changes them. Augmentation may draw from ``torch`` and from ``random``.
    """

    def __init__(
        self, data: Dataset, batch_size: int, device: torch.device, *, seed: int = 0, workers: int = 0
    ):
        self.batch_size = batch_size
        self.device = device
        self._data, self._seed, self._workers = data, seed, workers
        self._count = len(data)  # type: ignore[arg-type]
        self._tensors: list[Tensor] | None = None
        if isinstance(data, TensorDataset):
            self._tensors = [tensor.to(device) for tensor in data.tensors]

    @property
    def labels(self) -> Tensor | None:
        """All labels, where they are held in tensors."""
        return None if self._tensors is None else self._tensors[1]

    @property
    def shuffled_batches(self) -> int:
        """Number of batches of a shuffled epoch: full ones only, lest statistics rest on a few samples."""
        return max(1, self._count // self.batch_size)

    def shuffled(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from batch ``start`` on."""
        seed = self._seed * 1_000_003 + epoch
        order = torch.randperm(self._count, generator=torch.Generator().manual_seed(seed))
        chosen = order[: self.shuffled_batches * self.batch_size].split(self.batch_size)
        return self._batches(chosen[start:], seed)

    def ordered(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every sample once, in the order of the data set."""
        return self._batches(torch.arange(self._count).split(self.batch_size), self._seed)

    def _batches(self, indices: tuple[Tensor, ...], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        if self._tensors is not None:
            inputs, labels = self._tensors
            for index in indices:
                index = index.to(self.device)
                yield inputs[index], labels[index]
            return
        loader = DataLoader(
            _SeededItems(self._data, seed),
            batch_sampler=[index.tolist() for index in indices],
            num_workers=self._workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(seed),
            worker_init_fn=_ignore_interrupts,
        )
        for inputs, labels in loader:
            yield inputs.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


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


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which the terminal sends to every process, to the one that saves the search."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _describe(sample: Any) -> str:
    if isinstance(sample, tuple | list):
        return "(" + ", ".join(type(part).__name__ for part in sample) + ")"
    return type(sample).__name__
