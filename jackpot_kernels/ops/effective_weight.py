"""The weight under its mask, as matmuls and convolutions read it."""

import torch
from torch import Tensor

from jackpot_kernels.ops.pack_mask import unpack_mask


def effective_weight(weight: Tensor, words: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``weight * mask`` (Eq. 4), with +0 for every pruned weight.

    Args:
        weight: any floating dtype and memory format.
        words: packed mask, int32.  # [ceil(numel / 32)]
        dtype: of the result; the weight's own where none is given.

    Returns:
        A new tensor with the shape and strides of ``weight``.
    """
    # `clone` keeps the strides; `masked_fill` out of place does not.
    kept = weight.detach().clone().masked_fill_(~unpack_mask(words, weight.shape), 0)
    return kept.to(dtype or weight.dtype)
