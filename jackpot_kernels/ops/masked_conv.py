"""The masked convolution of one, two or three dimensions as an autograd function, and its kernels' operators.

As of the masked matmul, there is no operator of the whole, and a dense convolution is the library's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
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
    kept: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    effective = effective_weight(weight, words, x.dtype) if kept is None else kept
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, effective, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _dense_grad(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, of: int) -> Tensor:
    """Return the library's gradient of a convolution to x, which is 0, or to weight, which is 1."""
    stride, padding, dilation, groups = geometry
    window = stride, padding, dilation, False, [0] * len(stride), groups
    needs = [of == 0, of == 1, False]
    grads = torch.ops.aten.convolution_backward.default(grad, x, weight, None, *window, needs)
    result: Tensor = grads[of]
    return result


def _fused(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    cast = cast_weight(weight, kept, x)
    (x, cast), window = _as_images(geometry, x, cast)
    y: Tensor = torch.ops.jackpot.masked_conv_fused(x, cast, words, bias, *window)
    return y.squeeze(2) if weight.dim() == 3 else y


def _fused_backward(
    grad: Tensor,  # [N, O, ...]
    x: Tensor,  # [N, I, ...]
    weight: Tensor,  # [O, I / groups, ...]
    words: Tensor,
    kept: Tensor | None,
    geometry: Geometry,
    needs: Sequence[bool],
) -> Gradients:
    needs_x, needs_weight, needs_scores, needs_bias = needs
    if _is_channels_last(x):  # as is its gradient, but for torch.compile, which makes that contiguous
        grad = grad.contiguous(memory_format=torch.channels_last)
    cast, shape = cast_weight(weight, kept, x) if needs_x else weight, weight.shape
    (grad, x, weight, cast), window = _as_images(geometry, grad, x, weight, cast)
    dx = dweight = dscores = None
    if needs_x:
        dx = torch.ops.jackpot.masked_conv_fused_input_grad(
            grad, cast, words, x.shape, _is_channels_last(x), *window
        )
        dx = dx.squeeze(2) if len(shape) == 3 else dx
    if needs_weight or needs_scores:
        dweight, dscores = (
            None if g is None else g.view(shape)
            for g in torch.ops.jackpot.masked_conv_fused_weight_grads(
                grad, x, weight, words, (needs_weight, needs_scores), *window
            )
        )
    return dx, dweight, dscores, grad.sum((0, 2, 3)) if needs_bias else None


def _mixed_backward(
    grad: Tensor,  # [N, O, ...]
    x: Tensor,  # [N, I, ...]
    weight: Tensor,  # [O, I / groups, ...]
    words: Tensor,
    kept: Tensor | None,
    geometry: Geometry,
    needs: Sequence[bool],
) -> Gradients:
    needs_x, *others = needs
    dx = None
    if needs_x:
        effective = effective_weight(weight, words, x.dtype) if kept is None else kept
        dx = _dense_grad(grad, x, effective, geometry, 0)
    return dx, *_fused_backward(grad, x, weight, words, None, geometry, (False, *others))[1:]


def output_shape(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """Return the shape of the convolution.

    Raises:
        ValueError: the window is larger than ``x`` with its padding.
    """
    stride, padding, dilation, _ = geometry
    window = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    sizes = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in window]
    torch._check_value(
        all(size > 0 for size in sizes),
        lambda: f"x must be as large as the window with its padding, got shape {list(x.shape)}",
    )
    return x.shape[0], weight.shape[0], *sizes


def score_grad_(
    grad_scores: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    accumulate: bool,
    backend: str,
) -> None:
    """Add the score gradient ``G * weight`` (Eq. 6, 18) to ``grad_scores``, or write it there."""
    if backend in ("fused", "mixed"):
        (sums, grad, x, weight), window = _as_images(geometry, grad_scores, grad, x, weight)
        torch.ops.jackpot.masked_conv_fused_score_grad_(sums, grad, x, weight, accumulate, *window)
        # Nobody else counts what a Triton kernel writes; by the count autograd notices a late backward pass.
        torch.autograd.graph.increment_version(grad_scores)
        return
    grad_weight = _dense_grad(grad, x, weight.to(x.dtype), geometry, 1)
    if accumulate:
        grad_scores.addcmul_(grad_weight, weight)
    else:
        grad_scores.copy_(score_grad(grad_weight, weight))


def _as_images(geometry: Geometry, *tensors: Tensor) -> tuple[list[Tensor], Geometry]:
    """Return a convolution of two dimensions that stands for one of one dimension."""
    stride, padding, dilation, groups = geometry
    if len(stride) == 2:
        return list(tensors), geometry
    return [t.unsqueeze(2) for t in tensors], Geometry((1, *stride), (0, *padding), (1, *dilation), groups)


KERNELS = {"dense": _dense, "fused": _fused, "mixed": _dense}
# The backward pass of a dense convolution is the library's own.
_BACKWARD_KERNELS = {"fused": _fused_backward, "mixed": _mixed_backward}


def masked_conv(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    words: Tensor,
    kept: Tensor | None,
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
        kept: ``weight * mask`` in the dtype of ``x``, or for "fused", which masks it itself, ``weight`` in
            that dtype; made anew where it is None.
        bias: the dtype of ``x``.  # [O]
        stride, padding, dilation: one number a dimension; zeros are padded on both sides.
        groups: a divisor of I and O.
        backend: a key of ``KERNELS``.
    """
    geometry = Geometry(stride, padding, dilation, groups)
    return KERNELS[backend](x, weight, words, kept, bias, geometry)


class MaskedConvFunction(Function):
    """``masked_conv`` and its gradients to x, weight (Eq. 31), scores (Eq. 6, 18) and bias."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return masked_conv(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, words, kept, _, *window, ctx.backend = inputs
        ctx.geometry = Geometry(*window)
        ctx.save_for_backward(x, weight, words, kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, words, kept = ctx.saved_tensors
        needs_x, needs_weight, needs_scores, _, _, needs_bias = ctx.needs_input_grad[:6]
        needs = (needs_x, needs_weight, needs_scores, needs_bias)
        backward = _BACKWARD_KERNELS[ctx.backend]
        with torch.no_grad():
            grads = backward(grad, x, weight, words, kept, ctx.geometry, needs)
        dx, dweight, dscores, dbias = once("masked_conv", grads, grad, x, weight)
        return dx, dweight, dscores, None, None, dbias, None, None, None, None, None


def _fused_kernel(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None, *window: Any) -> Tensor:
    from jackpot_kernels.kernels.masked_conv import masked_conv_
    from jackpot_kernels.kernels.masked_linear import masked_matmul

    geometry = Geometry(*window)
    if _is_matmul(x, weight, geometry):
        return _as_planes(masked_matmul(_as_rows(x), weight[:, :, 0, 0], words, bias, transposed=False), x)
    y = _fused_fake(x, weight, words, bias, *window)
    masked_conv_(y, x, weight, words, bias, geometry)
    return y


def _fused_fake(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None, *window: Any) -> Tensor:
    size = output_shape(x, weight, Geometry(*window))
    channels_last = _is_channels_last(x) or _is_channels_last(weight)
    return _new_images(x, size, channels_last)


def _input_grad_kernel(
    grad: Tensor, weight: Tensor, words: Tensor, size: Sequence[int], channels_last: bool, *window: Any
) -> Tensor:
    from jackpot_kernels.kernels.masked_conv import masked_conv_input_grad_
    from jackpot_kernels.kernels.masked_linear import masked_matmul

    geometry = Geometry(*window)
    if channels_last and _is_matmul(grad, weight, geometry):
        return _as_planes(
            masked_matmul(_as_rows(grad), weight[:, :, 0, 0], words, None, transposed=True), grad
        )
    dx = _new_images(grad, size, channels_last)
    masked_conv_input_grad_(dx, grad, weight, words, geometry)
    return dx


def _input_grad_fake(
    grad: Tensor, weight: Tensor, words: Tensor, size: Sequence[int], channels_last: bool, *_: Any
) -> Tensor:
    return _new_images(grad, size, channels_last)


def _weight_grads_kernel(
    grad: Tensor, x: Tensor, weight: Tensor, words: Tensor, needs: Sequence[bool], *window: Any
) -> tuple[Tensor | None, Tensor | None]:
    dweight, dscores = _weight_grads_fake(grad, x, weight, words, needs)
    _write_weight_grads(grad, x, weight, words, dscores, dweight, Geometry(*window), False)
    return dweight, dscores


def _weight_grads_fake(
    grad: Tensor, x: Tensor, weight: Tensor, words: Tensor, needs: Sequence[bool], *_: Any
) -> tuple[Tensor | None, Tensor | None]:
    needs_weight, needs_scores = needs
    dweight = weight.new_empty(weight.shape) if needs_weight else None
    return dweight, weight.new_empty(weight.shape, dtype=torch.float32) if needs_scores else None


def _score_grad_kernel(
    grad_scores: Tensor, grad: Tensor, x: Tensor, weight: Tensor, accumulate: bool, *window: Any
) -> None:
    _write_weight_grads(grad, x, weight, None, grad_scores, None, Geometry(*window), accumulate)


def _write_weight_grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    words: Tensor | None,
    dscores: Tensor | None,
    dweight: Tensor | None,
    geometry: Geometry,
    accumulate: bool,
) -> None:
    from jackpot_kernels.kernels.masked_conv import masked_conv_weight_grads_
    from jackpot_kernels.kernels.masked_linear import weight_grads_

    if not _is_matmul(x, weight, geometry) or weight.numel() < _WEIGHTS_OF_A_MATMUL:
        masked_conv_weight_grads_(grad, x, weight, words, dscores, dweight, geometry, accumulate)
        return
    dscores, dweight = (None if t is None else t[:, :, 0, 0] for t in (dscores, dweight))
    matrix = weight[:, :, 0, 0]
    weight_grads_(_as_rows(grad), _as_rows(x), matrix, words, dscores, dweight, None, accumulate)


# A matmul's weight gradients are a sum over all pixels for each tile of the weight; those of a convolution
# are split where tiles are few: for 64 x 64 weights and 800,000 pixels, one tile took 3 ms on an H100.
_WEIGHTS_OF_A_MATMUL = 2**20


def _is_matmul(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Tell whether the convolution is a matmul of pixels, which lie one after the other, and the weight."""
    stride, padding, _, groups = geometry
    alone = weight.shape[2] == weight.shape[3] == 1 and all(s == 1 for s in stride) and not any(padding)
    if not (alone and groups == 1 and _is_channels_last(x)):
        return False
    if x.dtype != torch.float32:
        return True
    # PyTorch is told apart how each multiplies float32.
    convolution = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return (convolution == "tf32") == (torch.backends.cuda.matmul.fp32_precision == "tf32")


def _as_rows(images: Tensor) -> Tensor:  # [N, C, H, W] -> [N * H * W, C]
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _as_planes(rows: Tensor, like: Tensor) -> Tensor:  # [N * H * W, C] -> [N, C, H, W], channels_last
    num_images, _, height, width = like.shape
    return rows.view(num_images, height, width, -1).permute(0, 3, 1, 2)


def _is_channels_last(images: Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


def _new_images(like: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


# As a schema spells a ``Geometry``.
_WINDOW = "int[] stride, int[] padding, int[] dilation, int groups"
register(
    f"masked_conv_fused(Tensor x, Tensor weight, Tensor words, Tensor? bias, {_WINDOW}) -> Tensor",
    _fused_kernel,
    _fused_fake,
)
register(
    "masked_conv_fused_input_grad(Tensor grad, Tensor weight, Tensor words, SymInt[] size, "
    f"bool channels_last, {_WINDOW}) -> Tensor",
    _input_grad_kernel,
    _input_grad_fake,
)
register(
    "masked_conv_fused_weight_grads(Tensor grad, Tensor x, Tensor weight, Tensor words, bool[2] needs, "
    f"{_WINDOW}) -> (Tensor, Tensor)",
    _weight_grads_kernel,
    _weight_grads_fake,
)
register(
    "masked_conv_fused_score_grad_(Tensor(a!) grad_scores, Tensor grad, Tensor x, Tensor weight, "
    f"bool accumulate, {_WINDOW}) -> ()",
    _score_grad_kernel,
    lambda *_: None,
)
