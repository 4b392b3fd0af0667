"""Matmul and convolutions under a mask, with gradients to input, bias, scores and an unfrozen weight.

With ``G = dL/d(weight * mask)`` the scores get ``G * weight``, those of pruned weights too (Eq. 6, 18).
"""

from collections.abc import Sequence
from numbers import Integral
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor

from jackpot_kernels import reference
from jackpot_kernels._validate import (
    num_words,
    require_contiguous,
    require_device,
    require_dtype,
    require_shape,
)
from jackpot_kernels.kernels.availability import require_available
from jackpot_kernels.ops import masked_conv as conv_op
from jackpot_kernels.ops import masked_linear as linear_op
from jackpot_kernels.ops.dispatch import choose_backend
from jackpot_kernels.ops.masked import differentiable
from jackpot_kernels.ops.pack_mask import pack_mask, unpack_mask


def masked_linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return ``x @ (weight * mask).T + bias`` (Eq. 4).

    dL/dscores = G * weight (Eq. 6, 18);  dL/dweight = G * mask (Eq. 31);  G = dL/d(weight * mask)

    Args:
        x: floating, with any number of leading dimensions.  # [..., K]
        weight: floating, any strides; a gradient only if it asks for one.  # [M, K]
        scores: float32; its values do not matter here, its gradient is float32.  # [M, K]
        mask: bool, or the int32 words of ``pack_mask``.  # [M, K] or [ceil(M * K / 32)]
        bias: the dtype of ``weight``.  # [M]
        backend: "auto" (see ``use_backend``), "dense" (effective weight and the library's matmul), "fused"
            (Triton, the mask applied in registers), "mixed" ("dense", but the score gradient "fused") or
            "reference" (plain PyTorch). "fused" and "mixed" can be differentiated only once.

    Returns:
        The dtype of ``x``; under autocast its dtype, as of ``torch.nn.functional.linear``.  # [..., M]

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device or backend does not fit.
        RuntimeError: "fused" or "mixed" cannot run here.
    """
    words = _require_words(weight, scores, mask, 2)
    return linear(x, weight, scores, words, None, bias, backend)


def masked_linear_score_grad_(
    grad_scores: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    accumulate: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Add the score gradient of a masked matmul to ``grad_scores`` in place, and return it.

    dL/dscores = (grad.T @ x) * weight (Eq. 6, 18); "fused" multiplies and adds before anything is written.

    Args:
        grad_scores: float32, contiguous.  # [M, K]
        grad: gradient of the matmul's output; floating.  # [..., M]
        x: its input; the dtype of ``grad``.  # [..., K]
        weight: any floating dtype and strides.  # [M, K]
        accumulate: False writes the gradient over what is there.
        backend: as of ``masked_linear``. Each sums in an order of its own, so two agree only up to rounding;
            one repeats its bits, "fused" and "mixed" under one configuration of the tuning cache, the others
            where the library's matmul does.

    Raises:
        TypeError, ValueError, RuntimeError: as of ``masked_linear``.
    """
    _require_weight(weight, 2)
    _require_grad_scores(grad_scores, weight)
    _require_last("x", x, weight.shape[1])
    require_dtype("grad", grad, x.dtype)
    require_shape("grad", grad, [*x.shape[:-1], weight.shape[0]])
    for name, tensor in (("x", x), ("grad", grad)):
        require_device(name, tensor, weight.device)
    backend = choose_backend("masked_linear", backend, linear_op.KERNELS, x, weight)
    if backend in ("fused", "mixed"):
        _require_fused_dtypes(x=x, weight=weight)
    with torch.no_grad():
        linear_op.score_grad_(grad_scores, grad, x, weight, accumulate, backend)
    return grad_scores


def masked_conv1d(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Return the convolution of ``x`` with ``weight * mask`` over one dimension; see ``masked_conv2d``.

    Args:
        x: floating, batched or not.  # [N, I, L] or [I, L]
        weight: floating.  # [O, I / groups, K]
    """
    words = _require_words(weight, scores, mask, 3)
    return convolution(x, weight, scores, words, None, bias, stride, padding, dilation, groups, backend)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Return the convolution of ``x`` with ``weight * mask``, plus ``bias`` (Eq. 4).

    dL/dscores = G * weight (Eq. 6, 18);  dL/dweight = G * mask (Eq. 31);  G = dL/d(weight * mask)

    Args:
        x: floating, batched or not, contiguous or channels_last.  # [N, I, H, W] or [I, H, W]
        weight: floating, any strides; a gradient only if it asks for one.  # [O, I / groups, KH, KW]
        scores: float32; its values do not matter here, its gradient is float32 and contiguous.  # as weight
        mask: bool, or the int32 words of ``pack_mask``.  # as weight, or [ceil(numel / 32)]
        bias: the dtype of ``weight``.  # [O]
        stride, dilation: one number, or one a dimension.
        padding: the same, in elements of zeros on either side, or "valid" or "same".
        groups: a divisor of I and O.
        backend: "auto" (see ``use_backend``), "dense" (effective weight and the library's convolution),
            "fused" (Triton, the mask applied in registers), "mixed" ("dense", but the score gradient "fused")
            or "reference" (plain PyTorch). "fused" and "mixed" can be differentiated only once.

    Returns:
        The dtype of ``x``; under autocast its dtype, as of ``torch.nn.functional.conv2d``.  # [N, O, H', W']

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device, group count, padding or backend does not fit.
        RuntimeError: "fused" or "mixed" cannot run here.
    """
    words = _require_words(weight, scores, mask, 4)
    return convolution(x, weight, scores, words, None, bias, stride, padding, dilation, groups, backend)


def masked_conv3d(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Return the convolution of ``x`` with ``weight * mask`` over three dimensions; see ``masked_conv2d``.

    There is no fused kernel for it: "fused" and "mixed" raise, and "auto" is "dense".

    Args:
        x: floating, batched or not.  # [N, I, D, H, W] or [I, D, H, W]
        weight: floating.  # [O, I / groups, KD, KH, KW]
    """
    words = _require_words(weight, scores, mask, 5)
    return convolution(x, weight, scores, words, None, bias, stride, padding, dilation, groups, backend)


def masked_conv2d_score_grad_(
    grad_scores: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    accumulate: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Add the score gradient of a masked convolution to ``grad_scores`` in place, and return it.

    dL/dscores = G * weight (Eq. 6, 18); "fused" multiplies and adds before anything is written.

    Args:
        grad_scores: float32, contiguous.  # [O, I / groups, KH, KW]
        grad: gradient of the convolution's output; floating.  # [N, O, H', W']
        x: its input; the dtype of ``grad``.  # [N, I, H, W]
        weight: any floating dtype and memory format.  # [O, I / groups, KH, KW]
        stride, padding, dilation, groups: as of ``masked_conv2d``, padding as numbers.
        accumulate: False writes the gradient over what is there.
        backend: as of ``masked_conv2d``.

    Raises:
        TypeError, ValueError, RuntimeError: as of ``masked_conv2d``.
    """
    _require_weight(weight, 4)
    _require_grad_scores(grad_scores, weight)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {_kind(x)}")
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions, got shape {list(x.shape)}")
    _require_channels(x, weight, groups)
    geometry = conv_op.Geometry(
        _one_each("stride", stride, 2),
        _one_each("padding", padding, 2),
        _one_each("dilation", dilation, 2),
        groups,
    )
    require_dtype("grad", grad, x.dtype)
    require_shape("grad", grad, conv_op.output_shape(x, weight, geometry))
    for name, tensor in (("x", x), ("grad", grad)):
        require_device(name, tensor, weight.device)
    backend = choose_backend("masked_conv", backend, conv_op.KERNELS, x, weight, groups)
    if backend in ("fused", "mixed"):
        _require_fused_dtypes(x=x, weight=weight)
    with torch.no_grad():
        conv_op.score_grad_(grad_scores, grad, x, weight, geometry, accumulate, backend)
    return grad_scores


def linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    words: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    """Return ``masked_linear`` for a packed mask, and what a layer keeps of its weight."""
    backend = choose_backend("masked_linear", backend, linear_op.KERNELS, x, weight)
    x, bias = require_linear(x, weight, bias)
    if backend in ("fused", "mixed"):
        _require_fused(backend, x)
    if backend == "reference":
        mask = unpack_mask(words, weight.shape)
        return reference.masked_linear(x, weight, scores, mask, bias)
    if backend == "dense":
        made = differentiable(weight, scores, words, kept, x.dtype)
        return linear_op.masked_linear(x, weight, scores, words, made, bias, backend)
    y: Tensor = linear_op.MaskedLinearFunction.apply(x, weight, scores, words, kept, bias, backend)
    return y


def convolution(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    words: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    backend: str,
) -> Tensor:
    """Return the convolution for a packed mask, and what a layer keeps of its weight."""
    backend = choose_backend("masked_conv", backend, conv_op.KERNELS, x, weight, groups)
    x, bias = require_convolution(x, weight, bias, groups)
    batched = x.dim() == weight.dim()
    x = x if batched else x.unsqueeze(0)
    spatial = weight.dim() - 2
    stride, dilation = _one_each("stride", stride, spatial), _one_each("dilation", dilation, spatial)
    if isinstance(padding, str):
        x, padding = _pad(x, weight, stride, padding, dilation)
    window = (stride, _one_each("padding", padding, spatial), dilation, groups)
    if backend in ("fused", "mixed"):
        _require_fused(backend, x)
        if spatial == 3:
            wanted = f'one or two window dimensions for backend="{backend}"'
            raise ValueError(f'weight must have {wanted}, got three: use "dense"')
    if backend == "reference":
        mask = unpack_mask(words, weight.shape)
        y = reference.masked_conv(x, weight, scores, mask, bias, *window)
    elif backend == "dense":
        made = differentiable(weight, scores, words, kept, x.dtype)
        y = conv_op.masked_conv(x, weight, scores, words, made, bias, *window, backend)
    else:
        y = conv_op.MaskedConvFunction.apply(x, weight, scores, words, kept, bias, *window, backend)
    return y if batched else y.squeeze(0)


def require_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return x and bias as a matmul computes with them, or say what does not fit."""
    x, bias = _as_compute_dtype(x, weight, bias)
    _require_last("x", x, weight.shape[1])
    return x, bias


def require_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int
) -> tuple[Tensor, Tensor | None]:
    """Return x and bias as a convolution computes with them, or say what does not fit."""
    x, bias = _as_compute_dtype(x, weight, bias)
    _require_channels(x, weight, groups)
    return x, bias


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which a layer of this weight computes: autocast's where on, or its own."""
    return _autocast_dtype(weight) or weight.dtype


def _autocast_dtype(weight: Tensor) -> torch.dtype | None:
    device = weight.device.type
    if weight.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _as_compute_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cast x and bias under autocast, and check that both then agree with the weight."""
    dtype = _autocast_dtype(weight)
    if dtype is not None:
        x = x.to(dtype) if x.is_floating_point() else x
        bias = bias if bias is None else bias.to(dtype)
    dtype = dtype or weight.dtype
    require_dtype("x", x, dtype)
    require_device("x", x, weight.device)
    if bias is not None:
        require_dtype("bias", bias, dtype)
        require_device("bias", bias, weight.device)
        require_shape("bias", bias, weight.shape[:1])
    return x, bias


def _require_words(weight: Tensor, scores: Tensor, mask: Tensor, dims: int) -> Tensor:
    """Check what belongs to the weight, and return the mask as words."""
    _require_weight(weight, dims)
    require_dtype("scores", scores, torch.float32)
    require_shape("scores", scores, weight.shape)
    require_device("scores", scores, weight.device)
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.int32):
        raise TypeError(f"mask must be a bool tensor, or int32 words, got {_kind(mask)}")
    require_device("mask", mask, weight.device)
    if mask.dtype == torch.bool:
        require_shape("mask", mask, weight.shape)
        return pack_mask(mask)
    require_shape("mask as words", mask, [num_words(weight.numel())])
    require_contiguous("mask as words", mask)
    return mask


def _require_weight(weight: Tensor, dims: int) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight must be a floating-point tensor, got {_kind(weight)}")
    if weight.dim() != dims or weight.numel() == 0:
        raise ValueError(
            f"weight must have {dims} dimensions, none of them empty, got shape {list(weight.shape)}"
        )


def _require_grad_scores(grad_scores: Tensor, weight: Tensor) -> None:
    require_dtype("grad_scores", grad_scores, torch.float32)
    require_shape("grad_scores", grad_scores, weight.shape)
    require_device("grad_scores", grad_scores, weight.device)
    require_contiguous("grad_scores", grad_scores)


def _require_last(name: str, tensor: Tensor, size: int) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {_kind(tensor)}")
    if tensor.dim() == 0 or tensor.shape[-1] != size:
        raise ValueError(
            f"{name} must have {size} elements in its last dimension, got shape {list(tensor.shape)}"
        )


def _require_fused(backend: str, x: Tensor) -> None:
    """Check what the Triton kernels of a pass need; those of "mixed" run in the backward pass only."""
    _require_fused_dtypes(x=x)
    if backend == "mixed" and not torch.compiler.is_compiling():
        require_available(x.device)


def _require_fused_dtypes(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f'{name} must be float32, bfloat16 or float16 for backend="fused", got {_kind(tensor)}'
            )


def _kind(value: object) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__


def _require_channels(x: Tensor, weight: Tensor, groups: int) -> None:
    if not isinstance(groups, Integral):
        raise TypeError(f"groups must be an integer, got {type(groups).__name__}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} output channels of weight, got {groups}")
    dims, channels = weight.dim(), weight.shape[1] * groups
    if x.dim() not in (dims - 1, dims) or x.shape[1 - dims] != channels:
        raise ValueError(
            f"x must have {dims} or {dims - 1} dimensions and {channels} channels, got shape {list(x.shape)}"
        )


def _one_each(name: str, value: int | Sequence[int], count: int) -> Sequence[int]:
    try:
        values = (int(value),) * count if isinstance(value, int | Integral) else tuple(map(index, value))
    except TypeError:
        raise TypeError(f"{name} must be an integer or {count} of them, got {value!r}") from None
    if len(values) != count:
        raise ValueError(f"{name} must be one number or {count}, got {values}")
    least = 0 if name == "padding" else 1
    if min(values) < least:
        raise ValueError(f"{name} must be at least {least}, got {min(values)}")
    return values


def _pad(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: str, dilation: Sequence[int]
) -> tuple[Tensor, Sequence[int]]:
    """Return x and the symmetric padding that stand for "valid" or "same"."""
    if padding not in ("valid", "same"):
        raise ValueError(f'padding must be numbers, "valid" or "same", got {padding!r}')
    if padding == "valid":
        return x, (0,) * len(stride)
    if any(s != 1 for s in stride):
        raise ValueError(f'stride must be 1 where padding is "same", got {tuple(stride)}')
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    # An odd total puts its last column on the right, as torch.nn.functional does.
    extra = [side for t in reversed(total) for side in (0, t % 2)]
    return F.pad(x, extra) if any(extra) else x, [t // 2 for t in total]
