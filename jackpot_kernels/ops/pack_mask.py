"""Masks as bits: 32 weights in an int32 word, least significant bit first, in logical row-major order."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from jackpot_kernels._validate import num_words, require_contiguous, require_dtype, require_sizes


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask, one bit a weight.

    Bit ``i % 32`` of word ``i // 32`` is element ``i`` of the mask in logical row-major order; padding
    bits are 0.

    Args:
        mask: bool, any shape and memory format.

    Returns:
        Contiguous int32 words on the same device.  # [ceil(numel / 32)]

    Raises:
        TypeError: ``mask`` is not a bool tensor.
    """
    require_dtype("mask", mask, torch.bool)
    return torch.ops.jackpot.pack_mask(mask.contiguous())


def unpack_mask(words: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack the words of ``pack_mask``.

    Args:
        words: contiguous int32.  # [ceil(numel / 32)]
        shape: shape of the mask.

    Returns:
        Contiguous bool mask of that shape on the same device.

    Raises:
        TypeError: ``words`` is not an int32 tensor, or ``shape`` holds no sizes.
        ValueError: ``words`` is not contiguous or does not fit the shape.
    """
    require_dtype("words", words, torch.int32)
    require_contiguous("words", words)
    require_sizes("shape", shape)
    wanted = num_words(math.prod(shape))
    if words.numel() != wanted:
        raise ValueError(f"words must have {wanted} elements for shape {list(shape)}, got {words.numel()}")
    return torch.ops.jackpot.unpack_mask(words, shape)


def has_bits_after(words: Tensor, numel: int) -> bool:
    """Tell whether words of the right length for ``numel`` bits hold others; waits for the device."""
    rest = numel % 32
    if not rest or words.is_meta or words.numel() != num_words(numel):
        return False
    return int(words.flatten()[-1]) >> rest != 0


@torch.library.register_fake("jackpot::pack_mask")
def _(mask: Tensor) -> Tensor:
    return mask.new_empty(num_words(mask.numel()), dtype=torch.int32)


@torch.library.register_fake("jackpot::unpack_mask")
def _(words: Tensor, shape: Sequence[int]) -> Tensor:
    return words.new_empty(shape, dtype=torch.bool)
