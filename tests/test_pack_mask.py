"""Masks as bits, against NumPy's own packing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jackpot_kernels import pack_mask, reference, unpack_mask


def packed(mask: np.ndarray) -> np.ndarray:
    bits = np.concatenate([mask.ravel(), np.zeros(-mask.size % 32, bool)])
    return np.packbits(bits, bitorder="little").view("<i4")


@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_equals_numpy_and_comes_back(shape: list[int], seed: int) -> None:
    mask = np.random.default_rng(seed).random(shape) < 0.3
    words = pack_mask(torch.from_numpy(mask))
    assert words.numpy().tolist() == packed(mask).tolist()
    assert torch.equal(unpack_mask(words, shape), torch.from_numpy(mask))
    assert torch.equal(words, reference.pack_mask(torch.from_numpy(mask)))
    assert torch.equal(unpack_mask(words, shape), reference.unpack_mask(words, shape))


def test_any_byte_but_zero_is_true() -> None:
    mask = torch.arange(256, dtype=torch.uint8).view(torch.bool)
    assert pack_mask(mask).tolist() == [-2] + 7 * [-1]


def test_large_enough_for_several_threads() -> None:
    mask = torch.rand(3, 1_000_003) < 0.1
    assert pack_mask(mask).numpy().tolist() == packed(mask.numpy()).tolist()


def test_order_is_logical_whatever_the_memory_format() -> None:
    mask = torch.rand(4, 5, 3, 3) < 0.5
    assert torch.equal(pack_mask(mask.to(memory_format=torch.channels_last)), pack_mask(mask))
    assert torch.equal(pack_mask(mask.transpose(0, 1)), pack_mask(mask.transpose(0, 1).contiguous()))


def test_empty_and_full() -> None:
    assert pack_mask(torch.zeros(0, 3, dtype=torch.bool)).numel() == 0
    assert pack_mask(torch.ones(33, dtype=torch.bool)).tolist() == [-1, 1]


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(TypeError, match="mask must be bool, got float32"):
        pack_mask(torch.ones(3))
    with pytest.raises(TypeError, match="words must be int32, got int64"):
        unpack_mask(torch.ones(1, dtype=torch.int64), [3])
    with pytest.raises(ValueError, match=r"words must have 2 elements for shape \[33\], got 1"):
        unpack_mask(torch.ones(1, dtype=torch.int32), [33])
    with pytest.raises(ValueError, match="words must be contiguous"):
        unpack_mask(torch.ones(4, dtype=torch.int32)[::2], [64])


@pytest.mark.parametrize("shape", [32, None, (4.0, 8.0), (-4, -8), "32"])
def test_refuses_what_is_no_shape(shape: object) -> None:
    with pytest.raises(TypeError) as raised:
        unpack_mask(torch.ones(1, dtype=torch.int32), shape)
    assert str(raised.value) == f"shape must be a list of integers of at least 0, got {shape!r}"


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning"
)
def test_takes_the_shape_of_a_traced_tensor() -> None:
    mask = torch.rand(4, 8) < 0.5
    inputs = pack_mask(mask), mask
    traced = torch.jit.trace(lambda words, like: unpack_mask(words, like.shape), inputs)
    assert torch.equal(traced(*inputs), mask)


def test_operators_pass_opcheck() -> None:
    mask = torch.rand(7, 9) < 0.5
    torch.library.opcheck(torch.ops.jackpot.pack_mask, (mask,))
    torch.library.opcheck(torch.ops.jackpot.unpack_mask, (pack_mask(mask), [7, 9]))
