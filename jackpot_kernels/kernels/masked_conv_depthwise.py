"""The masked convolution of two dimensions where it is depthwise: of one input a group, computed directly.

A program takes channels of several groups. C inputs and F outputs are those of all groups, and there are
MULTIPLIER outputs to an input; the rest is as in `masked_conv.py`.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from jackpot_kernels.kernels.conv_places import (
    LAYOUTS,
    UNSPECIALIZED,
    Geometry,
    advanced,
    is_scattered,
    kernel_size,
    num_tiles,
    positions,
    sizes,
    variant,
    window,
)
from jackpot_kernels.kernels.grad_tiles import new_parts, split_sum, sum_parts_
from jackpot_kernels.kernels.mask_bits import keep_bits
from jackpot_kernels.kernels.tuning import Config, Variant


@triton.jit(do_not_specialize=UNSPECIALIZED)
def depthwise_fwd_kernel(
    x_ptr,  # [N, F / MULTIPLIER, H, W]
    w_ptr,  # [F, 1, KERNEL_H, KERNEL_W]
    words_ptr,
    bias_ptr,  # [F]
    y_ptr,  # [N, F, P, Q]
    N,
    H,
    W,
    P,
    Q,
    F,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wo,
    stride_wr,
    stride_ws,
    stride_yn,
    stride_yo,
    stride_yp,
    stride_yq,
    step_h,
    step_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write BLOCK_M outputs at BLOCK_N positions.

    y[f, p] = sum over t of (w * mask)[f, t] x[f // MULTIPLIER, p, t] + bias[f]
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    i_o, i_p = tl.program_id(0) % tl.cdiv(F, BLOCK_M), tl.program_id(0) // tl.cdiv(F, BLOCK_M)
    o_o = i_o * BLOCK_M + tl.arange(0, BLOCK_M)
    image, p, q = positions(i_p.to(tl.int64) * BLOCK_N, P, Q, BLOCK_N)
    m_o, m_n = o_o < F, image < N
    p_x = (x_ptr + image * stride_xn)[None, :] + (o_o // MULTIPLIER * stride_xc)[:, None]

    b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tap in range(TAPS):
        r, s = tap // KERNEL_W, tap % KERNEL_W
        b_w = tl.load(w_ptr + o_o * stride_wo + (r * stride_wr + s * stride_ws), mask=m_o, other=0)
        b_w = tl.where(keep_bits(words_ptr, o_o * TAPS + tap, m_o), b_w, 0).to(tl.float32)  # [BLOCK_M]
        h, w = p * step_h - pad_h + r * dilation_h, q * step_w - pad_w + s * dilation_w
        m_x = (h >= 0) & (h < H) & (w >= 0) & (w < W) & m_n
        o_x = (h * stride_xh + w * stride_xw)[None, :]
        b_x = tl.load(p_x + o_x, mask=m_o[:, None] & m_x[None, :], other=0)  # [BLOCK_M, BLOCK_N]
        b_y += b_w[:, None] * b_x.to(tl.float32)

    if HAS_BIAS:
        b_y += tl.load(bias_ptr + o_o, mask=m_o, other=0).to(tl.float32)[:, None]
    o_y = (o_o * stride_yo)[:, None] + (p * stride_yp + q * stride_yq)[None, :]
    p_y = (y_ptr + image * stride_yn)[None, :] + o_y
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_o[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def depthwise_dx_kernel(
    dy_ptr,  # [N, C * MULTIPLIER, P, Q]
    w_ptr,  # [C * MULTIPLIER, 1, KERNEL_H, KERNEL_W]
    words_ptr,
    dx_ptr,  # [N, C, H, W]
    N,
    H,
    W,
    P,
    Q,
    C,
    stride_yn,
    stride_yo,
    stride_yp,
    stride_yq,
    stride_wo,
    stride_wr,
    stride_ws,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    step_h,
    step_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write BLOCK_M channels of the input's gradient at BLOCK_N places.

    dx[c, q] = sum over f of c and t of (w * mask)[f, t] dy[f, p], where tap t of the window at p sees place q
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    i_c, i_p = tl.program_id(0) % tl.cdiv(C, BLOCK_M), tl.program_id(0) // tl.cdiv(C, BLOCK_M)
    o_c = i_c * BLOCK_M + tl.arange(0, BLOCK_M)
    image, h, w = positions(i_p.to(tl.int64) * BLOCK_N, H, W, BLOCK_N)
    m_c, m_n = o_c < C, image < N
    p_dy = (dy_ptr + image * stride_yn)[None, :]

    b_dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(MULTIPLIER * TAPS):
        o_o, tap = o_c * MULTIPLIER + i // TAPS, i % TAPS
        r, s = tap // KERNEL_W, tap % KERNEL_W
        b_w = tl.load(w_ptr + o_o * stride_wo + (r * stride_wr + s * stride_ws), mask=m_c, other=0)
        b_w = tl.where(keep_bits(words_ptr, o_o * TAPS + tap, m_c), b_w, 0).to(tl.float32)  # [BLOCK_M]
        p, q = h + pad_h - r * dilation_h, w + pad_w - s * dilation_w
        m_y = (
            (p >= 0) & (p < P * step_h) & (p % step_h == 0) & (q >= 0) & (q < Q * step_w) & (q % step_w == 0)
        )
        o_y = (o_o * stride_yo)[:, None] + (p // step_h * stride_yp + q // step_w * stride_yq)[None, :]
        b_dy = tl.load(p_dy + o_y, mask=m_c[:, None] & (m_y & m_n)[None, :], other=0)  # [BLOCK_M, BLOCK_N]
        b_dx += b_w[:, None] * b_dy.to(tl.float32)

    o_x = (o_c * stride_xc)[:, None] + (h * stride_xh + w * stride_xw)[None, :]
    p_dx = (dx_ptr + image * stride_xn)[None, :] + o_x
    tl.store(p_dx, b_dx.to(dx_ptr.dtype.element_ty), mask=m_c[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def depthwise_weight_grads_kernel(
    dy_ptr,  # [N, F, P, Q]
    x_ptr,  # [N, F / MULTIPLIER, H, W]
    parts_ptr,  # [PARTS, F, KERNEL_H, KERNEL_W], float32
    N,
    H,
    W,
    P,
    Q,
    F,
    stride_yn,
    stride_yo,
    stride_yp,
    stride_yq,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    step_h,
    step_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    part,
    MULTIPLIER: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write a part of G, summed over ``part`` positions, for BLOCK_M channels and BLOCK_N taps.

    The positions of a block are added up after the loop, so that nothing crosses threads in it.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    i_o, i_tap = tl.program_id(0) % tl.cdiv(F, BLOCK_M), tl.program_id(0) // tl.cdiv(F, BLOCK_M)
    i_part = tl.program_id(1).to(tl.int64)
    o_o, tap = i_o * BLOCK_M + tl.arange(0, BLOCK_M), i_tap * BLOCK_N + tl.arange(0, BLOCK_N)
    m_o, m_tap = o_o < F, tap < TAPS
    image, p, q = positions(i_part * part, P, Q, BLOCK_K)
    o_channel = (o_o // MULTIPLIER * stride_xc)[:, None, None]

    b_g = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    for _ in range(part // BLOCK_K):
        m_n = image < N
        o_y = (o_o * stride_yo)[:, None] + (p * stride_yp + q * stride_yq)[None, :]
        p_dy = (dy_ptr + image * stride_yn)[None, :] + o_y
        b_dy = tl.load(p_dy, mask=m_o[:, None] & m_n[None, :], other=0)  # [BLOCK_M, BLOCK_K]
        h = (p * step_h - pad_h)[None, :] + (tap // KERNEL_W * dilation_h)[:, None]
        w = (q * step_w - pad_w)[None, :] + (tap % KERNEL_W * dilation_w)[:, None]
        m_x = (h >= 0) & (h < H) & (w >= 0) & (w < W) & m_n[None, :] & m_tap[:, None]
        p_x = (x_ptr + image * stride_xn)[None, None, :] + (h * stride_xh + w * stride_xw)[None, :, :]
        b_x = tl.load(p_x + o_channel, mask=m_o[:, None, None] & m_x[None, :, :], other=0)
        b_g += b_dy.to(tl.float32)[:, None, :] * b_x.to(tl.float32)
        image, p, q = advanced(image, p, q, P, Q, BLOCK_K)

    index = (o_o * TAPS)[:, None] + tap[None, :]
    p_parts = parts_ptr + i_part * (F * TAPS) + index
    tl.store(p_parts, tl.sum(b_g, 2), mask=m_o[:, None] & m_tap[None, :])


# Blocks that follow memory: along the channels, or, where these are scattered, along the places of an image.
PRODUCT_CONFIGS = {
    False: Config({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 3),
    True: Config({"BLOCK_M": 4, "BLOCK_N": 256}, 4, 3),
}
GRADS_CONFIGS = {
    False: Config({"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 8}, 4, 3),
    True: Config({"BLOCK_M": 2, "BLOCK_N": 16, "BLOCK_K": 128}, 8, 3),
}


def is_depthwise(weight: Tensor, geometry: Geometry) -> bool:
    """Tell whether these kernels serve a convolution."""
    return weight.shape[1] == 1 and geometry[3] > 1


def depthwise_conv_(
    y: Tensor, x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None, geometry: Geometry
) -> None:
    """Do what ``masked_conv_`` does."""
    groups, outputs = geometry[3], weight.shape[0]
    config = PRODUCT_CONFIGS[is_scattered((groups,), x, y)]
    depthwise_fwd_kernel[(num_tiles(outputs, y.numel() // outputs, config),)](
        x,
        weight,
        words,
        bias,
        y,
        *sizes(x, y),
        outputs,
        *x.stride(),
        *_strides_without_channel(weight),
        *y.stride(),
        *window(geometry),
        MULTIPLIER=outputs // groups,
        **kernel_size(weight),
        HAS_BIAS=bias is not None,
        **config.options,
    )


def depthwise_input_grad_(
    dx: Tensor, grad: Tensor, weight: Tensor, words: Tensor, geometry: Geometry
) -> None:
    """Do what ``masked_conv_input_grad_`` does."""
    groups = geometry[3]
    config = PRODUCT_CONFIGS[is_scattered((groups,), grad, dx)]
    depthwise_dx_kernel[(num_tiles(groups, dx.numel() // groups, config),)](
        grad,
        weight,
        words,
        dx,
        *sizes(dx, grad),
        groups,
        *grad.stride(),
        *_strides_without_channel(weight),
        *dx.stride(),
        *window(geometry),
        MULTIPLIER=weight.shape[0] // groups,
        **kernel_size(weight),
        **config.options,
    )


def depthwise_weight_grads_(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    words: Tensor | None,
    dscores: Tensor | None,
    dweight: Tensor | None,
    geometry: Geometry,
    accumulate: bool,
) -> None:
    """Do what ``masked_conv_weight_grads_`` does, always by way of parts."""
    groups, outputs = geometry[3], weight.shape[0]
    config = GRADS_CONFIGS[is_scattered((groups,), grad, x)]
    tiles = num_tiles(outputs, weight.shape[2] * weight.shape[3], config)
    num_parts, part = split_sum(grad.numel() // outputs, weight.numel(), tiles, config.values["BLOCK_K"])
    parts = new_parts(num_parts, weight)
    depthwise_weight_grads_kernel[(tiles, num_parts)](
        grad,
        x,
        parts,
        *sizes(x, grad),
        outputs,
        *grad.stride(),
        *x.stride(),
        *window(geometry),
        part,
        MULTIPLIER=outputs // groups,
        **kernel_size(weight),
        **config.options,
    )
    sum_parts_(parts, weight, words, dscores, dweight, accumulate)


def _strides_without_channel(weight: Tensor) -> tuple[int, int, int]:
    return weight.stride(0), weight.stride(2), weight.stride(3)


def variants() -> Iterator[Variant]:
    """Yield every kernel under every configuration, as launches of a 3 x 3 window would compile it."""
    for layout in ("channels_last", "scattered"):
        constants = {"MULTIPLIER": 1}
        with_bias = constants | {"HAS_BIAS": True}
        config = PRODUCT_CONFIGS[LAYOUTS[layout]]
        yield variant(depthwise_fwd_kernel, "half", layout, with_bias, config)
        yield variant(depthwise_dx_kernel, "half", layout, constants, config)
        config = GRADS_CONFIGS[LAYOUTS[layout]]
        yield variant(depthwise_weight_grads_kernel, "half", layout, constants, config)
