"""The scores' gradient from the effective weight's: one product, in float32."""

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("jackpot", "IMPL")


def score_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the scores' gradient ``grad * weight`` (Eq. 6, 18), in float32 and contiguous.

    Args:
        grad: that of ``weight * mask``, freshly made: it may be overwritten; floating, any strides.
        weight: of the same shape; floating, any strides.
    """
    if torch.float64 in (grad.dtype, weight.dtype):
        grad, weight = grad.float(), weight.float()
    # Torch's own kernels convert bfloat16 an element at a time: for 4096 x 4096 weights, whose bytes take an
    # H100 46 us, they took 100.
    if grad.is_cuda and not torch.compiler.is_compiling():
        result: Tensor = torch.ops.jackpot.score_grad(grad, weight)
        return result
    if grad.dtype == torch.float32 and grad.is_contiguous():
        return grad.mul_(weight)
    return _product(grad, weight)


def _product(grad: Tensor, weight: Tensor) -> Tensor:
    # Gradients in batches know no out.
    if not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad):
        return (grad.float() * weight.float()).contiguous()
    # A multiplication by float32 promotes the other factor first, so this one pass rounds once.
    return torch.mul(grad, weight.float(), out=grad.new_empty(grad.shape, dtype=torch.float32))


_LIBRARY.impl("score_grad", _product, "CPU")


@torch.library.register_fake("jackpot::score_grad")
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty(grad.shape, dtype=torch.float32)
