"""scikit-learn's handwritten digits."""

import torch
from torch.utils.data import TensorDataset

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
