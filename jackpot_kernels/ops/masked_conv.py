"""The masked convolution of one, two or three dimensions as an operator and as an autograd function.

As for the masked matmul, the function calls the kernels themselves and not the operator that is made of them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jackpot_kernels.ops.effective_weight import effective_weight as make_effective_weight
from jackpot_kernels.ops.masked import Gradients, once, register, weight_gradients


class Geometry(NamedTuple):
    """How a window moves over its input; padding is with zeros, as much on either side."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


def _dense(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    effective_weight: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    if effective_weight is None:
        effective_weight = make_effective_weight(weight, words, x.dtype)
    stride, padding, dilation, groups = geometry
    return torch.convolution(
        x, effective_weight, bias, stride, padding, dilation, False, [0] * len(stride), groups
    )


def _dense_backward(
    grad: Tensor,  # [N, O, ...]
    x: Tensor,  # [N, I, ...]
    weight: Tensor,  # [O, I / groups, ...]
    words: Tensor,
    effective_weight: Tensor | None,
    geometry: Geometry,
    needs: Sequence[bool],
) -> Gradients:
    needs_x, needs_weight, needs_scores, needs_bias = needs
    if effective_weight is None:
        effective_weight = make_effective_weight(weight, words, x.dtype)
    stride, padding, dilation, groups = geometry
    dx, grad_weight, dbias = torch.ops.aten.convolution_backward.default(
        grad,
        x,
        effective_weight,
        [weight.shape[0]],
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        groups,
        [needs_x, needs_weight or needs_scores, needs_bias],
    )
    if grad_weight is None:
        return dx, None, None, dbias
    return dx, *weight_gradients(grad_weight, weight, words, needs_weight, needs_scores), dbias


KERNELS = {"dense": (_dense, _dense_backward)}


def masked_conv(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    words: Tensor,
    effective_weight: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
) -> Tensor:
    """Return the convolution of ``x`` with ``weight * mask``, plus ``bias`` (Eq. 4).

    Args:
        x: the dtype it computes in.  # [N, I, ...]
        weight: any floating dtype and memory format.  # [O, I / groups, ...]
        scores: float32; only its gradient matters here.  # [O, I / groups, ...]
        words: packed mask, int32.  # [ceil(numel / 32)]
        effective_weight: ``weight * mask`` in the dtype of ``x``; made anew where it is None.
        bias: the dtype of ``x``.  # [O]
        stride, padding, dilation: one number a dimension; zeros are padded on both sides.
        groups: a divisor of I and O.
        backend: a key of ``KERNELS``.
    """
    geometry = Geometry(stride, padding, dilation, groups)
    return KERNELS[backend][0](x, weight, words, effective_weight, bias, geometry)


def masked_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    effective_weight: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs: Sequence[bool],
    backend: str,
) -> Gradients:
    """Return the gradients of x, weight, scores (Eq. 6, 18) and bias, each where needed, else None."""
    geometry = Geometry(stride, padding, dilation, groups)
    return KERNELS[backend][1](grad, x, weight, words, effective_weight, geometry, needs)


class MaskedConvFunction(torch.autograd.Function):
    """``masked_conv`` and its gradients to x, weight (Eq. 31), scores (Eq. 6, 18) and bias."""

    # `apply` binds every named argument of `forward` at each call, which can cost more than the matmul.
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return masked_conv(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, words, effective_weight, _, stride, padding, dilation, groups, ctx.backend = inputs
        ctx.geometry = Geometry(stride, padding, dilation, groups)
        ctx.save_for_backward(x, weight, words, effective_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, words, effective_weight = ctx.saved_tensors
        needs_x, needs_weight, needs_scores, _, _, needs_bias = ctx.needs_input_grad[:6]
        needs = (needs_x, needs_weight, needs_scores, needs_bias)
        backward = KERNELS[ctx.backend][1]
        with torch.no_grad():
            grads = backward(grad, x, weight, words, effective_weight, ctx.geometry, needs)
        dx, dweight, dscores, dbias = once("masked_conv", grads, grad, x, weight)
        return dx, dweight, dscores, None, None, dbias, None, None, None, None, None


register(
    "masked_conv(Tensor x, Tensor weight, Tensor scores, Tensor words, Tensor? effective_weight, "
    "Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, str backend) -> Tensor",
    masked_conv,
)
register(
    "masked_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor words, Tensor? effective_weight, "
    "int[] stride, int[] padding, int[] dilation, int groups, bool[4] needs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    masked_conv_backward,
)
torch.library.register_autograd(
    "jackpot::masked_conv", MaskedConvFunction.backward, setup_context=MaskedConvFunction.setup_context
)
