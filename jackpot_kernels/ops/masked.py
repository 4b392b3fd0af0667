"""What the masked matmul and the masked convolution share: gradients behind the weight, and registration."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jackpot_kernels.ops.effective_weight import effective_weight

_LIBRARY = torch.library.Library("jackpot", "FRAGMENT")

# Of x, weight, scores and bias; None where nobody asked.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def cast_weight(weight: Tensor, kept: Tensor | None, x: Tensor) -> Tensor:
    """Return the weight in the dtype of x, which a layer may have kept."""
    return weight.to(x.dtype) if kept is None else kept


def weight_gradients(
    grad: Tensor, weight: Tensor, words: Tensor, needs_weight: bool, needs_scores: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight (Eq. 31) and scores (Eq. 6, 18), each where it is needed.

    dL/dw = G * mask;  dL/dscores = G * w, in float32, for pruned weights too;  G = dL/d(w * mask)

    Args:
        grad: G, freshly made: it may be overwritten.
        weight: of the same shape.
        words: packed mask, int32.

    Returns:
        The first in the dtype of ``weight``, the second contiguous in logical order, as the scores are.
    """
    dweight = effective_weight(grad, words, weight.dtype) if needs_weight else None
    if not needs_scores:
        return dweight, None
    if grad.dtype == torch.float64:
        grad = grad.float()
    if grad.dtype == torch.float32 and grad.is_contiguous():
        return dweight, grad.mul_(weight.float())
    # A multiplication by float32 promotes the other factor first, so this one pass rounds once.
    return dweight, torch.mul(grad, weight.float(), out=grad.new_empty(grad.shape, dtype=torch.float32))


class _Once(torch.autograd.Function):
    """The first ``count`` tensors as they are; nobody may differentiate them."""

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f'{ctx.name} can be differentiated only once; backend="reference" has second derivatives'
        )


def once(name: str, grads: tuple[Tensor | None, ...], *sources: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients, marked so that differentiating them with respect to their sources raises."""
    if not torch.is_grad_enabled():
        return grads
    marked: tuple[Tensor | None, ...] = _Once.apply(name, len(grads), *grads, *sources)
    return marked


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any] | None = None) -> None:
    """Register an operator whose code is the same function on CPU and CUDA.

    Args:
        schema: of the operator, its name first.
        kernel: its code.
        fake: what it returns, without values; the kernel itself where that is made of other operators.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"jackpot::{name}", fake or kernel, lib=_LIBRARY)
