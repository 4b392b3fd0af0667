"""The masked matmul as an autograd function, and the operators that its kernels are.

There is no operator of the whole: the way through the dispatcher and back would cost a small layer more than
its matmul, and Inductor or a FLOP counter would see one closed box. A dense matmul needs no function of its
own: it is the library's, of an effective weight with gradients (`ops/masked.py`).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jackpot_kernels.ops.effective_weight import effective_weight
from jackpot_kernels.ops.masked import (
    Function,
    Gradients,
    cast_weight,
    once,
    register,
)
from jackpot_kernels.ops.score_grad import score_grad


def _dense(x: Tensor, weight: Tensor, words: Tensor, kept: Tensor | None, bias: Tensor | None) -> Tensor:
    effective = effective_weight(weight, words, x.dtype) if kept is None else kept
    return F.linear(x, effective, bias)


def _fused(x: Tensor, weight: Tensor, words: Tensor, kept: Tensor | None, bias: Tensor | None) -> Tensor:
    cast = cast_weight(weight, kept, x)
    y: Tensor = torch.ops.jackpot.masked_linear_fused(x, cast, words, bias)
    return y


def _fused_backward(
    grad: Tensor,  # [..., M]
    x: Tensor,  # [..., K]
    weight: Tensor,  # [M, K]
    words: Tensor,
    kept: Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    needs_x, needs_weight, needs_scores, needs_bias = needs
    dx = dweight = dscores = dbias = None
    if needs_x:
        cast = cast_weight(weight, kept, x)
        dx = torch.ops.jackpot.masked_linear_fused_input_grad(grad, cast, words)
    if needs_weight or needs_scores:
        dweight, dscores, dbias = torch.ops.jackpot.masked_linear_fused_weight_grads(
            grad, x, weight, words, needs[1:]
        )
    elif needs_bias:
        dbias = grad.reshape(-1, weight.shape[0]).sum(0)
    return dx, dweight, dscores, dbias


def _mixed_backward(
    grad: Tensor,  # [..., M]
    x: Tensor,  # [..., K]
    weight: Tensor,  # [M, K]
    words: Tensor,
    kept: Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    needs_x, *others = needs
    dx = None
    if needs_x:
        effective = effective_weight(weight, words, x.dtype) if kept is None else kept
        dx = (grad.reshape(-1, weight.shape[0]) @ effective).view(x.shape)
    return dx, *_fused_backward(grad, x, weight, words, None, (False, *others))[1:]


def score_grad_(
    grad_scores: Tensor, grad: Tensor, x: Tensor, weight: Tensor, accumulate: bool, backend: str
) -> None:
    """Add the score gradient ``(grad.T @ x) * weight`` (Eq. 6, 18) to ``grad_scores``, or write it there."""
    if backend in ("fused", "mixed"):
        torch.ops.jackpot.masked_linear_fused_score_grad_(grad_scores, grad, x, weight, accumulate)
        # Nobody else counts what a Triton kernel writes; by the count autograd notices a late backward pass.
        torch.autograd.graph.increment_version(grad_scores)
        return
    grad_weight = grad.reshape(-1, weight.shape[0]).t() @ x.reshape(-1, weight.shape[1])  # [M, K]
    if accumulate:
        grad_scores.addcmul_(grad_weight, weight)
    else:
        grad_scores.copy_(score_grad(grad_weight, weight))


KERNELS = {"dense": _dense, "fused": _fused, "mixed": _dense}
# The backward pass of a dense matmul is the library's own.
_BACKWARD_KERNELS = {"fused": _fused_backward, "mixed": _mixed_backward}


def masked_linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    words: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    """Return ``x @ (weight * mask).T + bias`` (Eq. 4).

    Args:
        x: the dtype it computes in.  # [..., K]
        weight: any floating dtype.  # [M, K]
        scores: float32; only its gradient matters here.  # [M, K]
        words: packed mask, int32.  # [ceil(M * K / 32)]
        kept: ``weight * mask`` in the dtype of ``x``, or for "fused", which masks it itself, ``weight`` in
            that dtype; made anew where it is None.  # [M, K]
        bias: the dtype of ``x``.  # [M]
        backend: a key of ``KERNELS``.
    """
    return KERNELS[backend](x, weight, words, kept, bias)


class MaskedLinearFunction(Function):
    """``masked_linear`` and its gradients to x, weight (Eq. 31), scores (Eq. 6, 18) and bias."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return masked_linear(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, words, kept, _, ctx.backend = inputs
        ctx.save_for_backward(x, weight, words, kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, words, kept = ctx.saved_tensors
        needs_x, needs_weight, needs_scores, _, _, needs_bias, _ = ctx.needs_input_grad
        needs = (needs_x, needs_weight, needs_scores, needs_bias)
        backward = _BACKWARD_KERNELS[ctx.backend]
        with torch.no_grad():
            grads = backward(grad, x, weight, words, kept, needs)
        dx, dweight, dscores, dbias = once("masked_linear", grads, grad, x, weight)
        return dx, dweight, dscores, None, None, dbias, None


def _fused_kernel(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None) -> Tensor:
    from jackpot_kernels.kernels.masked_linear import masked_matmul

    y = masked_matmul(x.reshape(-1, weight.shape[1]), weight, words, bias, transposed=False)
    return y.view(*x.shape[:-1], weight.shape[0])


def _fused_fake(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _input_grad_kernel(grad: Tensor, weight: Tensor, words: Tensor) -> Tensor:
    from jackpot_kernels.kernels.masked_linear import masked_matmul

    dx = masked_matmul(grad.reshape(-1, weight.shape[0]), weight, words, None, transposed=True)
    return dx.view(*grad.shape[:-1], weight.shape[1])


def _input_grad_fake(grad: Tensor, weight: Tensor, words: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _weight_grads_kernel(
    grad: Tensor, x: Tensor, weight: Tensor, words: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from jackpot_kernels.kernels.masked_linear import weight_grads_

    dweight, dscores, dbias = _weight_grads_fake(grad, x, weight, words, needs)
    rows = grad.reshape(-1, weight.shape[0])
    weight_grads_(rows, x.reshape(-1, weight.shape[1]), weight, words, dscores, dweight, dbias)
    return dweight, dscores, dbias


def _weight_grads_fake(
    grad: Tensor, x: Tensor, weight: Tensor, words: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_weight, needs_scores, needs_bias = needs
    dweight = weight.new_empty(weight.shape) if needs_weight else None
    dscores = weight.new_empty(weight.shape, dtype=torch.float32) if needs_scores else None
    return dweight, dscores, grad.new_empty(weight.shape[0]) if needs_bias else None


def _score_grad_kernel(
    grad_scores: Tensor, grad: Tensor, x: Tensor, weight: Tensor, accumulate: bool
) -> None:
    from jackpot_kernels.kernels.masked_linear import weight_grads_

    rows = grad.reshape(-1, weight.shape[0])
    inputs = x.reshape(-1, weight.shape[1])
    weight_grads_(rows, inputs, weight, None, grad_scores, None, None, accumulate)


register(
    "masked_linear_fused(Tensor x, Tensor weight, Tensor words, Tensor? bias) -> Tensor",
    _fused_kernel,
    _fused_fake,
)
register(
    "masked_linear_fused_input_grad(Tensor grad, Tensor weight, Tensor words) -> Tensor",
    _input_grad_kernel,
    _input_grad_fake,
)
register(
    "masked_linear_fused_weight_grads(Tensor grad, Tensor x, Tensor weight, Tensor words, bool[3] needs) "
    "-> (Tensor, Tensor, Tensor)",
    _weight_grads_kernel,
    _weight_grads_fake,
)
register(
    "masked_linear_fused_score_grad_(Tensor(a!) grad_scores, Tensor grad, Tensor x, Tensor weight, "
    "bool accumulate) -> ()",
    _score_grad_kernel,
    lambda *_: None,
)
