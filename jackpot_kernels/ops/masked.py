"""What the masked matmul and the masked convolution share: the weight's gradients, and registration."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jackpot_kernels.kernels.availability import require_available
from jackpot_kernels.ops.effective_weight import effective_weight
from jackpot_kernels.ops.pack_mask import unpack_mask
from jackpot_kernels.ops.score_grad import score_grad

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
    return dweight, score_grad(grad, weight) if needs_scores else None


class Function(torch.autograd.Function):
    """An autograd function that is given every argument, by position."""

    @classmethod
    def apply(cls, *inputs: Any) -> Any:
        """Do what torch's does, less what only a transform of ``torch.func`` needs.

        Torch reads the signature of ``forward`` and looks for dead wrappers at each call, which took 17 of
        28 us of a small convolution.
        """
        if torch._C._are_functorch_transforms_active():
            return super().apply(*inputs)
        return super(torch.autograd.Function, cls).apply(*inputs)  # type: ignore[misc]


class EffectiveWeightFunction(Function):
    """An effective weight at hand as ``weight * mask`` (Eq. 4), for a library's matmul or convolution.

    All that runs in Python of a frozen dense layer's backward pass is one multiplication.
    """

    # For ``torch.vmap`` over inputs, as gradients of each sample need it.
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scores: Tensor, words: Tensor, made: Tensor) -> Tensor:
        # Not the tensor itself, which autograd would then take for a view; memory and version are the same.
        return made.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, _, words, _ = inputs
        ctx.save_for_backward(weight, words)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, words = ctx.saved_tensors
        needs_weight, needs_scores, _, _ = ctx.needs_input_grad
        if not torch.is_grad_enabled():
            return *weight_gradients(grad, weight, words, needs_weight, needs_scores), None, None
        # These gradients will be differentiated in their turn.
        mask = unpack_mask(words, weight.shape)
        dweight = grad.where(mask, 0).to(weight.dtype) if needs_weight else None
        return dweight, grad.float() * weight.float() if needs_scores else None, None, None


def differentiable(
    weight: Tensor, scores: Tensor, words: Tensor, made: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return ``weight * mask`` in ``dtype``, with gradients to weight (Eq. 31) and scores (Eq. 6, 18).

    Args:
        made: that product where it is at hand; otherwise it is made anew.
    """
    if made is None:
        made = effective_weight(weight, words, dtype)
    if not torch.is_grad_enabled():
        return made
    result: Tensor = EffectiveWeightFunction.apply(weight, scores, words, made)
    return result


class _Once(Function):
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
            f'{ctx.name} can be differentiated only once; backend="dense" has second derivatives'
        )


def once(name: str, grads: tuple[Tensor | None, ...], *sources: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients, marked so that differentiating them with respect to their sources raises."""
    if not torch.is_grad_enabled():
        return grads
    marked: tuple[Tensor | None, ...] = _Once.apply(name, len(grads), *grads, *sources)
    return marked


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator of Triton kernels; on tensors of the CPU they run in Triton's interpreter.

    Args:
        schema: of the operator, its name first, and first of its arguments a tensor.
        kernel: its code. It alone imports the kernels, and thereby triton, which may be missing.
        fake: what it returns, without values.
    """
    name = schema[: schema.index("(")]

    def run(*args: Any) -> Any:
        require_available(args[0].device)
        return kernel(*args)

    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"jackpot::{name}", fake, lib=_LIBRARY)
