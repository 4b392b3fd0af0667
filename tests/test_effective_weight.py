"""The weight under its mask."""

import numpy as np
import pytest
import torch

from jackpot_kernels import pack_mask, reference
from jackpot_kernels.ops.effective_weight import effective_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_keeps_bits_and_layout_and_writes_plus_zero(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    weight = torch.randn(4, 5, 3, 3, dtype=dtype).to(memory_format=memory_format)
    mask = torch.rand(4, 5, 3, 3) < 0.4
    made = effective_weight(weight, pack_mask(mask))
    assert made.stride() == weight.stride() and made.dtype == dtype
    assert torch.equal(made[mask], weight[mask])
    assert not np.signbit(made[~mask].double().numpy()).any() and not made[~mask].any()
    assert torch.equal(made, reference.effective_weight(weight, pack_mask(mask)))


def test_converts_as_torch_does() -> None:
    weight = torch.randn(33, 7)
    words = pack_mask(torch.ones(33, 7, dtype=torch.bool))
    assert torch.equal(effective_weight(weight, words, torch.bfloat16), weight.bfloat16())


def test_a_masked_nan_is_zero() -> None:
    weight = torch.full((2,), float("nan"))
    assert not effective_weight(weight, pack_mask(torch.tensor([False, False]))).any()
