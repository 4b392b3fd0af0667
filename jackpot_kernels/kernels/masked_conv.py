"""The masked convolution of two dimensions as implicit matmuls.

With t a tap of the window, p a position of the output, and ``x[c, p, t]`` what tap t of the window at p sees
of channel c, zero where that is padding:

    y[f, p] = sum over c and t of (w * mask)[f, c, t] x[c, p, t] + bias[f]
    dx[c, q] = sum over f and t of (w * mask)[f, c, t] dy[f, p], where tap t of the window at p sees place q
    G[f, c, t] = sum over p of dy[f, p] x[c, p, t];  dscores = G * w;  dweight = G * mask

The masked weight is the left operand of its products, which may come from registers. A step of their sums
takes one tap of BLOCK_K channels, or, FLAT, BLOCK_K pairs of channel and tap where channels are few. The mask
is put into that order first, so that a step reads a word for 32 weights. Tensors have any strides; C inputs
and F outputs are those of one group; offsets within an image or the weight fit in 32 bits.

`masked_conv_boxes.py` competes where it can serve, and `masked_conv_depthwise.py` serves what is depthwise.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jackpot_kernels.kernels.availability import has_copy_engine, launching_on
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
from jackpot_kernels.kernels.descriptors import describe, has_whole_rows
from jackpot_kernels.kernels.dot import dot
from jackpot_kernels.kernels.grad_tiles import (
    SUM_BLOCK,
    conv_sum_parts_kernel,
    new_parts,
    split_sum,
    sum_parts_,
    write_tile,
)
from jackpot_kernels.kernels.mask_bits import bit_values, keep_tile, realign_kernel
from jackpot_kernels.kernels.masked_conv_boxes import (
    GRADS_CONFIGS,
    PRODUCT_CONFIGS,
    boxable,
    boxed_conv_,
    boxed_conv_grads_,
    is_boxed,
    is_large,
)
from jackpot_kernels.kernels.masked_conv_depthwise import (
    depthwise_conv_,
    depthwise_input_grad_,
    depthwise_weight_grads_,
    is_depthwise,
)
from jackpot_kernels.kernels.tuning import HOPPER, Config, Variant, choose, listed

# What puts a place outside of every image, added or subtracted: a comparison less for each of them.
FAR = tl.constexpr(-(2**31))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def conv_fwd_kernel(
    x_ptr,  # [N, groups * C, H, W]
    w_ptr,  # [groups * F, C, KERNEL_H, KERNEL_W]
    words_ptr,  # [groups * F, KERNEL_H * KERNEL_W, ceil(C / 32)]; or, FLAT, as w, rows padded
    bias_ptr,  # [groups * F]
    y_ptr,  # [N, groups * F, P, Q]; where DESCRIPTOR, it describes tiles of [N * P * Q, F]
    N,
    H,
    W,
    P,
    Q,
    C,
    F,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wo,
    stride_wc,
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
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    FLAT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write BLOCK_M outputs of a group at BLOCK_N positions."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    ROWS: tl.constexpr = 1 if FLAT else TAPS  # of the mask, for each output
    i_o, i_p = tl.program_id(0) % tl.cdiv(F, BLOCK_M), tl.program_id(0) // tl.cdiv(F, BLOCK_M)
    i_group = tl.program_id(1)
    o_o = i_o * BLOCK_M + tl.arange(0, BLOCK_M)
    image, p, q = positions(i_p.to(tl.int64) * BLOCK_N, P, Q, BLOCK_N)
    m_o, m_n = o_o < F, image < N
    o_o += i_group * F
    top, left = p * step_h - pad_h, q * step_w - pad_w
    p_x = x_ptr + image * stride_xn + i_group * C * stride_xc + offset(top, left, stride_xh, stride_xw)
    top = tl.where(m_n, top, FAR)

    bits = bit_values(words_ptr, N)
    b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(num_steps(C, TAPS, BLOCK_K, FLAT)):
        o_c, tap = channels_and_taps(step, TAPS, BLOCK_K, FLAT)
        r, s = tap // KERNEL_W, tap % KERNEL_W
        m_w = m_o[:, None] & (o_c < C)[None, :]
        o_w = o_o[:, None] * stride_wo + (o_c * stride_wc + (r * stride_wr + s * stride_ws))[None, :]
        b_w = tl.load(w_ptr + o_w, mask=m_w, other=0)  # [BLOCK_M, BLOCK_K]
        row, column = o_o * ROWS + step % ROWS, step // ROWS * BLOCK_K
        num_rows, num_columns = (i_group + 1) * F * ROWS, tl.cdiv(C * (TAPS // ROWS), 32) * 32
        b_keep = keep_tile(words_ptr, bits, row, column, num_rows, num_columns, BLOCK_M, BLOCK_K)
        b_w = tl.where(b_keep, b_w, 0)
        down, right = r * dilation_h, s * dilation_w
        o_x = o_c * stride_xc + offset(down, right, stride_xh, stride_xw)
        right = tl.where(o_c < C, right, FAR)
        m_x = within(top[None, :] + down[:, None], H) & within(left[None, :] + right[:, None], W)
        b_x = tl.load(p_x[None, :] + o_x[:, None], mask=m_x, other=0)  # [BLOCK_K, BLOCK_N]
        b_y = dot(b_w, b_x, b_y, PRECISION)

    if HAS_BIAS:
        b_y += tl.load(bias_ptr + o_o, mask=m_o, other=0).to(tl.float32)[:, None]
    if DESCRIPTOR:
        y_ptr.store([i_p * BLOCK_N, i_o * BLOCK_M], tl.trans(b_y.to(y_ptr.dtype)))
    else:
        o_y = (o_o * stride_yo)[:, None] + (p * stride_yp + q * stride_yq)[None, :]
        p_y = (y_ptr + image * stride_yn)[None, :] + o_y
        tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_o[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def conv_dx_kernel(
    dy_ptr,  # [N, groups * F, P, Q]
    w_ptr,  # [groups * F, C, KERNEL_H, KERNEL_W]
    words_ptr,  # [groups * F, KERNEL_H * KERNEL_W, ceil(C / 32)]
    dx_ptr,  # [N, groups * C, H, W]; where DESCRIPTOR, it describes tiles of [N * H * W, C]
    N,
    H,
    W,
    P,
    Q,
    C,
    F,
    stride_yn,
    stride_yo,
    stride_yp,
    stride_yq,
    stride_wo,
    stride_wc,
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
    every_h,
    every_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    FLAT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write BLOCK_M channels of a group of the input's gradient at BLOCK_N places.

    The places of one program are equal modulo the window's steps, so that the same taps see all of them:
    every ``every_h``-th row of the window from a first one on, and columns likewise.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    i_c, i_p = tl.program_id(0) % tl.cdiv(C, BLOCK_M), tl.program_id(0) // tl.cdiv(C, BLOCK_M)
    i_group = tl.program_id(1)
    first_h, first_w = tl.program_id(2) // step_w, tl.program_id(2) % step_w
    o_c = i_c * BLOCK_M + tl.arange(0, BLOCK_M)
    image, h, w = positions(i_p.to(tl.int64) * BLOCK_N, tl.cdiv(H, step_h), tl.cdiv(W, step_w), BLOCK_N)
    h, w = h * step_h + first_h, w * step_w + first_w
    m_c, m_n = o_c < C, (image < N) & (h < H) & (w < W)
    num_r, first_r = taps_that_see(first_h + pad_h, step_h, dilation_h, KERNEL_H)
    num_s, first_s = taps_that_see(first_w + pad_w, step_w, dilation_w, KERNEL_W)
    # Where tap (first_r, first_s) sees the place from; the window's steps divide what is divided here.
    p, q = (h + pad_h - first_r * dilation_h) // step_h, (w + pad_w - first_s * dilation_w) // step_w
    every_p, every_q = every_h * dilation_h // step_h, every_w * dilation_w // step_w
    p_dy = dy_ptr + image * stride_yn + i_group * F * stride_yo + offset(p, q, stride_yp, stride_yq)
    p = tl.where(m_n, p, FAR)

    bits = bit_values(words_ptr, N)
    b_dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(num_steps(F, num_r * num_s, BLOCK_K, FLAT)):
        o_o, tap = channels_and_taps(step, num_r * num_s, BLOCK_K, FLAT)
        i_r, i_s = tap // num_s, tap % num_s
        r, s = first_r + i_r * every_h, first_s + i_s * every_w
        m_w = m_c[:, None] & (o_o < F)[None, :]
        row = i_group * F + o_o
        o_w = (o_c * stride_wc)[:, None] + (row * stride_wo + (r * stride_wr + s * stride_ws))[None, :]
        b_w = tl.load(w_ptr + o_w, mask=m_w, other=0)  # [BLOCK_M, BLOCK_K]
        row = row * TAPS + (r * KERNEL_W + s)
        num_rows, num_columns = (i_group + 1) * F * TAPS, tl.cdiv(C, 32) * 32
        b_keep = keep_tile(words_ptr, bits, row, i_c * BLOCK_M, num_rows, num_columns, BLOCK_K, BLOCK_M)
        b_w = tl.where(tl.trans(b_keep), b_w, 0)
        up, back = i_r * every_p, i_s * every_q
        o_y = o_o * stride_yo - offset(up, back, stride_yp, stride_yq)
        back = tl.where(o_o < F, back, FAR)
        m_y = within(p[None, :] - up[:, None], P) & within(q[None, :] - back[:, None], Q)
        b_dy = tl.load(p_dy[None, :] + o_y[:, None], mask=m_y, other=0)  # [BLOCK_K, BLOCK_N]
        b_dx = dot(b_w, b_dy, b_dx, PRECISION)

    if DESCRIPTOR:
        dx_ptr.store([i_p * BLOCK_N, i_c * BLOCK_M], tl.trans(b_dx.to(dx_ptr.dtype)))
    else:
        o_x = ((i_group * C + o_c) * stride_xc)[:, None] + (h * stride_xh + w * stride_xw)[None, :]
        p_dx = (dx_ptr + image * stride_xn)[None, :] + o_x
        tl.store(p_dx, b_dx.to(dx_ptr.dtype.element_ty), mask=m_c[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def conv_weight_grads_kernel(
    dy_ptr,  # [N, groups * F, P, Q]
    x_ptr,  # [N, groups * C, H, W]
    w_ptr,  # [groups * F, C, KERNEL_H, KERNEL_W]
    words_ptr,
    dscores_ptr,  # as w, contiguous, float32
    dweight_ptr,  # as w, contiguous
    parts_ptr,  # [PARTS, as w], contiguous, float32
    N,
    H,
    W,
    P,
    Q,
    C,
    F,
    groups,
    stride_yn,
    stride_yo,
    stride_yp,
    stride_yq,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wo,
    stride_wc,
    stride_wr,
    stride_ws,
    step_h,
    step_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    part,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    FLAT: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write what is made of G for BLOCK_M outputs of a group and BLOCK_N channels (FLAT: channels and taps).

    A program sums over ``part`` positions, a multiple of BLOCK_K. If these are not all, its G goes to parts.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    i_o, i_c = tl.program_id(0) % tl.cdiv(F, BLOCK_M), tl.program_id(0) // tl.cdiv(F, BLOCK_M)
    i_group, i_part = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_o = i_o * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c, tap = channels_and_taps(i_c, TAPS, BLOCK_N, FLAT)
    r, s = tap // KERNEL_W, tap % KERNEL_W
    m_o, m_c = o_o < F, o_c < C
    o_o += i_group * F
    image, p, q = positions(i_part * part, P, Q, BLOCK_K)

    b_g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(part // BLOCK_K):
        m_n = image < N
        o_y = (o_o * stride_yo)[:, None] + (p * stride_yp + q * stride_yq)[None, :]
        p_dy = (dy_ptr + image * stride_yn)[None, :] + o_y
        b_dy = tl.load(p_dy, mask=m_o[:, None] & m_n[None, :], other=0)  # [BLOCK_M, BLOCK_K]
        h = (p * step_h - pad_h)[:, None] + (r * dilation_h)[None, :]
        w = (q * step_w - pad_w)[:, None] + (s * dilation_w)[None, :]
        m_x = within(h, H) & within(w, W) & m_n[:, None] & m_c[None, :]
        o_x = (o_c * stride_xc)[None, :] + (h * stride_xh + w * stride_xw)
        p_x = (x_ptr + i_group * C * stride_xc + image * stride_xn)[:, None] + o_x
        b_x = tl.load(p_x, mask=m_x, other=0)  # [BLOCK_K, BLOCK_N]
        b_g = dot(b_dy, b_x, b_g, PRECISION)
        image, p, q = advanced(image, p, q, P, Q, BLOCK_K)

    index = o_o[:, None] * (C * TAPS) + (o_c * TAPS + tap)[None, :]
    o_w = o_o[:, None] * stride_wo + (o_c * stride_wc + (r * stride_wr + s * stride_ws))[None, :]
    write_tile(
        b_g,
        index,
        o_w,
        m_o[:, None] & m_c[None, :],
        i_part * (groups * F * C * TAPS),
        parts_ptr,
        w_ptr,
        words_ptr,
        dscores_ptr,
        dweight_ptr,
        HAS_SCORES,
        HAS_WEIGHT,
        HAS_PARTS,
        ACCUMULATE,
    )


@triton.jit
def within(index, size):
    """Tell where ``0 <= index < size``, in one comparison."""
    return index.to(tl.uint32) < tl.cast(size, tl.uint32)


@triton.jit
def offset(row, column, stride_row, stride_column):
    """Return an offset of 64 bits: a place in the padding can be far from the image."""
    return row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column


@triton.jit
def num_steps(channels, num_taps, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    if FLAT:
        steps = tl.cdiv(channels * num_taps, BLOCK)
    else:
        steps = tl.cdiv(channels, BLOCK) * num_taps
    return steps


@triton.jit
def channels_and_taps(step, num_taps, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """Return the channels of a step and, FLAT, the tap of each, else the one tap of all."""
    o_k = tl.arange(0, BLOCK)
    if FLAT:
        o_k += step * BLOCK
        channels, taps = o_k // num_taps, o_k % num_taps
    else:
        channels, taps = step // num_taps * BLOCK + o_k, step % num_taps + tl.arange(0, 1)
    return channels, taps


@triton.jit
def taps_that_see(place, step, dilation, KERNEL: tl.constexpr):
    """Return how many taps of a window, wherever it stands, see a padded place, and the first of them."""
    count, first = 0, 0
    for i in tl.static_range(KERNEL):
        sees = (place - (KERNEL - 1 - i) * dilation) % step == 0
        count += sees.to(tl.int32)
        first = tl.where(sees, KERNEL - 1 - i, first)
    return count, first


# Fewer channels than this leave most of a step empty that takes them for one tap.
_FEW_CHANNELS = 16
# Words that a program realigns.
_REALIGN_BLOCK = 32


def _config(m: int, n: int, k: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps, num_stages)


# By what limits them: 16-bit elements or float32, elements that cannot be copied 16 bytes at a time because
# channels are not next to each other ("scattered"), and the registers of exact float32 products.
FORWARD_CONFIGS = {
    "half": [_config(128, 128, 32, 8, 4), _config(64, 128, 32, 4, 4)],
    "half, Hopper": [
        _config(128, 128, 64, 8, 3),
        _config(128, 256, 64, 8, 3),
        _config(64, 128, 32, 4, 4),
    ],
    "half scattered": [_config(64, 128, 32, 8, 2)],
    "tf32": [_config(64, 128, 32, 8, 3), _config(64, 64, 32, 4, 3)],
    "tf32 scattered": [_config(64, 64, 32, 4, 3)],
    "ieee": [_config(32, 32, 32, 4, 3)],
}
INPUT_CONFIGS = {
    "half": [_config(128, 128, 32, 8, 4), _config(64, 128, 32, 4, 4)],
    "half, Hopper": [
        _config(128, 128, 64, 8, 3),
        _config(128, 256, 64, 8, 3),
        _config(64, 128, 32, 4, 4),
    ],
    "half scattered": [_config(64, 128, 32, 8, 2)],
    "tf32": [_config(128, 64, 32, 8, 3)],
    "tf32 scattered": [_config(64, 64, 32, 8, 3)],
    "ieee": [_config(32, 32, 32, 4, 3)],
}
WEIGHT_CONFIGS = {
    "half": [_config(128, 128, 64, 8, 3), _config(64, 128, 32, 4, 4), _config(128, 64, 64, 8, 3)],
    "half scattered": [_config(64, 32, 32, 8, 2)],
    "half scattered, Hopper": [_config(64, 64, 32, 8, 2)],
    "tf32": [_config(64, 128, 32, 8, 3), _config(64, 64, 32, 8, 3)],
    "tf32 scattered": [_config(64, 64, 32, 8, 2)],
    "ieee": [_config(32, 32, 32, 4, 3)],
}


def masked_conv_(
    y: Tensor, x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None, geometry: Geometry
) -> None:
    """Write the convolution of ``x`` with ``weight * mask``, plus ``bias``, to ``y``.

    Args:
        y: the dtype of ``x``.  # [N, O, P, Q]
        x: float32, bfloat16 or float16; accumulated in float32.  # [N, I, H, W]
        weight: the dtype of ``x``.  # [O, I / groups, KH, KW]
        words: packed mask, int32.  # [ceil(numel / 32)]
        bias: the dtype of ``x``.  # [O]
    """
    if y.numel() == 0:
        return
    _require_short_offsets(weight, x, y)
    bias = None if bias is None else bias.contiguous()
    with launching_on(x.device):
        if is_depthwise(weight, geometry):
            depthwise_conv_(y, x, weight, words, bias, geometry)
            return
        _, inputs, outputs = _channels(weight, geometry)
        flat = inputs < _FEW_CHANNELS
        words = _realigned(words, weight, flat)
        configs = _pick(FORWARD_CONFIGS, x, flat or is_scattered((inputs, outputs), x, weight))
        if not flat and boxable(x, weight, geometry, x, weight, y):
            configs = configs + PRODUCT_CONFIGS

        def run(config: Config) -> None:
            if is_boxed(config):
                boxed_conv_(y, x, weight, words, bias, geometry, False, config)
            else:
                _conv_(y, x, weight, words, bias, geometry, config)

        run(choose("masked_conv", _key(x, y, weight, geometry, configs), configs, run))


def _conv_(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    config: Config,
) -> None:
    """Do what ``masked_conv_`` does, in one configuration."""
    groups, inputs, outputs = _channels(weight, geometry)
    rows = _rows(y, groups)
    conv_fwd_kernel[(num_tiles(outputs, y.numel() // y.shape[1], config), groups)](
        x,
        weight,
        words,
        bias,
        y if rows is None else describe(rows, config.values["BLOCK_N"], config.values["BLOCK_M"]),
        *sizes(x, y),
        inputs,
        outputs,
        *x.stride(),
        *weight.stride(),
        *y.stride(),
        *window(geometry),
        **kernel_size(weight),
        FLAT=inputs < _FEW_CHANNELS,
        DESCRIPTOR=rows is not None,
        HAS_BIAS=bias is not None,
        PRECISION=_precision(x),
        **config.options,
    )


def masked_conv_input_grad_(
    dx: Tensor, grad: Tensor, weight: Tensor, words: Tensor, geometry: Geometry
) -> None:
    """Write the input's gradient of a masked convolution to ``dx``.

    Args:
        dx: the dtype of ``grad``.  # [N, I, H, W]
        grad: gradient of the output; float32, bfloat16 or float16.  # [N, O, P, Q]
        weight: the dtype of ``grad``.  # [O, I / groups, KH, KW]
        words: packed mask, int32.  # [ceil(numel / 32)]
    """
    if dx.numel() == 0:
        return
    _require_short_offsets(weight, dx, grad)
    with launching_on(grad.device):
        if is_depthwise(weight, geometry):
            depthwise_input_grad_(dx, grad, weight, words, geometry)
            return
        _, inputs, outputs = _channels(weight, geometry)
        flat = outputs < _FEW_CHANNELS
        words = _realigned(words, weight, False)
        configs = _pick(INPUT_CONFIGS, grad, flat or is_scattered((inputs, outputs), grad, weight))
        if not flat and boxable(dx, weight, geometry, grad, weight, dx):
            configs = configs + PRODUCT_CONFIGS

        def run(config: Config) -> None:
            if is_boxed(config):
                boxed_conv_(dx, grad, weight, words, None, geometry, True, config)
            else:
                _conv_input_grad_(dx, grad, weight, words, geometry, config)

        run(choose("masked_conv_input_grad", _key(dx, grad, weight, geometry, configs), configs, run))


def _conv_input_grad_(
    dx: Tensor, grad: Tensor, weight: Tensor, words: Tensor, geometry: Geometry, config: Config
) -> None:
    """Do what ``masked_conv_input_grad_`` does, in one configuration."""
    groups, inputs, outputs = _channels(weight, geometry)
    num_images, _, height, width = dx.shape
    stride, _, dilation, _ = geometry
    rows = _rows(dx, groups) if math.prod(stride) == 1 else None
    # Places that are equal modulo the strides are the business of one program.
    places = num_images * triton.cdiv(height, stride[0]) * triton.cdiv(width, stride[1])
    conv_dx_kernel[(num_tiles(inputs, places, config), groups, math.prod(stride))](
        grad,
        weight,
        words,
        dx if rows is None else describe(rows, config.values["BLOCK_N"], config.values["BLOCK_M"]),
        *sizes(dx, grad),
        inputs,
        outputs,
        *grad.stride(),
        *weight.stride(),
        *dx.stride(),
        *window(geometry),
        *(s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)),
        **kernel_size(weight),
        FLAT=outputs < _FEW_CHANNELS,
        DESCRIPTOR=rows is not None,
        PRECISION=_precision(grad),
        **config.options,
    )


def masked_conv_weight_grads_(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    words: Tensor | None,
    dscores: Tensor | None,
    dweight: Tensor | None,
    geometry: Geometry,
    accumulate: bool = False,
) -> None:
    """Write gradients of a masked convolution, each where an output is given.

    dL/dscores = G * weight (Eq. 6, 18);  dL/dweight = G * mask (Eq. 31);  G = dL/d(weight * mask)

    Where too few programs would share the sums over positions, G is summed in parts, then these in order.

    Args:
        grad: gradient of the output; float32, bfloat16 or float16.  # [N, O, P, Q]
        x: the dtype of ``grad``.  # [N, I, H, W]
        weight: float32, bfloat16 or float16.  # [O, I / groups, KH, KW]
        words: packed mask, int32, needed for ``dweight``.  # [ceil(numel / 32)]
        dscores: float32, contiguous.  # as weight
        dweight: contiguous.  # as weight
        accumulate: add to ``dscores`` what is otherwise written to it.
    """
    _require_short_offsets(weight, x, grad)
    with launching_on(x.device):
        if is_depthwise(weight, geometry):
            depthwise_weight_grads_(grad, x, weight, words, dscores, dweight, geometry, accumulate)
            return
        _, inputs, outputs = _channels(weight, geometry)
        flat = inputs < _FEW_CHANNELS
        configs = _pick(WEIGHT_CONFIGS, x, flat or is_scattered((inputs, outputs), grad, x))
        if not flat and boxable(x, weight, geometry, grad, x):
            configs = configs + GRADS_CONFIGS
        if dweight is not None:
            configs = [config for config in configs if not is_large(config)]

        def run(dscores: Tensor | None, config: Config) -> None:
            launch = boxed_conv_grads_ if is_boxed(config) else _conv_weight_grads_
            launch(grad, x, weight, words, dscores, dweight, geometry, accumulate, config)

        def rehearse(config: Config) -> None:
            """Add to scores that nobody needs."""
            run(torch.empty_like(dscores) if accumulate and dscores is not None else dscores, config)

        key = (*_key(x, grad, weight, geometry, configs), accumulate, dweight is not None)
        run(dscores, choose("masked_conv_weight_grads", key, configs, rehearse))


def _conv_weight_grads_(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    words: Tensor | None,
    dscores: Tensor | None,
    dweight: Tensor | None,
    geometry: Geometry,
    accumulate: bool,
    config: Config,
) -> None:
    """Do what ``masked_conv_weight_grads_`` does, in one configuration."""
    groups, inputs, outputs = _channels(weight, geometry)
    flat, num_taps = inputs < _FEW_CHANNELS, weight.shape[2] * weight.shape[3]
    tiles = num_tiles(outputs, inputs * num_taps if flat else inputs, config) * (1 if flat else num_taps)
    num_places = grad.numel() // grad.shape[1]
    num_parts, part = split_sum(num_places, weight.numel(), tiles * groups, config.values["BLOCK_K"])
    parts = new_parts(num_parts, weight) if num_parts > 1 else None
    conv_weight_grads_kernel[(tiles, groups, num_parts)](
        grad,
        x,
        weight,
        words,
        dscores,
        dweight,
        parts,
        *sizes(x, grad),
        inputs,
        outputs,
        groups,
        *grad.stride(),
        *x.stride(),
        *weight.stride(),
        *window(geometry),
        part,
        **kernel_size(weight),
        FLAT=flat,
        HAS_SCORES=dscores is not None,
        HAS_WEIGHT=dweight is not None,
        HAS_PARTS=parts is not None,
        ACCUMULATE=accumulate,
        PRECISION=_precision(x),
        **config.options,
    )
    if parts is not None:
        sum_parts_(parts, weight, words, dscores, dweight, accumulate)


def _require_short_offsets(weight: Tensor, *images: Tensor) -> None:
    if weight.numel() >= 2**31:
        raise ValueError(
            f'weight must have fewer than 2**31 elements for backend="fused", got shape {list(weight.shape)}'
        )
    # Between images, and only there, offsets are of 64 bits.
    for name, tensor, first in (("weight", weight, 0), *(("an image", image, 1) for image in images)):
        dims = zip(tensor.shape[first:], tensor.stride()[first:], strict=True)
        if sum((n - 1) * stride for n, stride in dims) >= 2**31:
            raise ValueError(
                f'{name} must span fewer than 2**31 elements for backend="fused", got shape '
                f"{list(tensor.shape)} with strides {list(tensor.stride())}"
            )


def _channels(weight: Tensor, geometry: Geometry) -> tuple[int, int, int]:
    """Return groups, and the inputs and outputs of one."""
    groups = geometry[3]
    return groups, weight.shape[1], weight.shape[0] // groups


def _realigned(words: Tensor, weight: Tensor, flat: bool) -> Tensor:
    """Return words of [outputs, taps, channels], or [outputs, channels * taps] if ``flat``, rows padded."""
    outputs, columns = weight.shape[:2]
    num_taps = weight.shape[2] * weight.shape[3]
    if flat:
        columns, num_taps = columns * num_taps, 1
    if num_taps == 1 and columns % 32 == 0:
        return words
    realigned = words.new_empty(outputs * num_taps * triton.cdiv(columns, 32))
    realign_kernel[(triton.cdiv(len(realigned), _REALIGN_BLOCK),)](
        words, realigned, len(realigned), columns, TAPS=num_taps, BLOCK=_REALIGN_BLOCK
    )
    return realigned


def _precision(x: Tensor) -> str:
    """Return how float32 is multiplied, as PyTorch is told to; other dtypes have one way only."""
    told: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if told == "tf32" or x.dtype != torch.float32 else "ieee"


def _pick(configs: dict[str, list[Config]], x: Tensor, scattered: bool) -> list[Config]:
    """Return the configurations for the device, the dtype and the order of the operands."""
    kind = _precision(x) if x.dtype == torch.float32 else "half"
    return listed(configs, _listed_as(kind, scattered), x.device)


def _listed_as(kind: str, scattered: bool) -> str:
    return f"{kind} scattered" if scattered and kind != "ieee" else kind


def _rows(images: Tensor, groups: int) -> Tensor | None:
    """Return the places of images by their channels, if tiles of them may be written by a descriptor.

    Otherwise they leave the registers of a product in 16 steps with a barrier before and after each.
    """
    dense = images.is_contiguous(memory_format=torch.channels_last) and images.dtype != torch.float32
    if not (dense and groups == 1 and has_copy_engine(images.device)):
        return None
    rows = images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])
    return rows if has_whole_rows(rows) and len(rows) < 2**31 else None


def _key(x: Tensor, y: Tensor, weight: Tensor, geometry: Geometry, configs: list[Config]) -> tuple[Any, ...]:
    """Return what a choice depends on: dtypes, sizes, which dimension of the tensors is dense, and how many
    configurations serve them."""
    orders = tuple(t.stride(1) == 1 for t in (x, y, weight))
    num_images = 1 << max(x.shape[0] - 1, 0).bit_length()
    shapes = (num_images, *sizes(x, y)[1:], *weight.shape)
    return (
        x.dtype,
        weight.dtype,
        _precision(x),
        *shapes,
        *window(geometry),
        geometry[3],
        *orders,
        len(configs),
    )


def variants() -> Iterator[Variant]:
    """Yield every kernel under every configuration, as launches of a 3 x 3 window would compile it."""
    grads = {"HAS_SCORES": True, "HAS_WEIGHT": False, "ACCUMULATE": True, "HAS_PARTS": False}
    for kernel, table, constants in (
        (conv_fwd_kernel, FORWARD_CONFIGS, {"HAS_BIAS": True, "DESCRIPTOR": False}),
        (conv_dx_kernel, INPUT_CONFIGS, {"every_h": 1, "every_w": 1, "DESCRIPTOR": False}),
        (conv_weight_grads_kernel, WEIGHT_CONFIGS, grads),
    ):
        for kind, (layout, scattered) in product(("half", "tf32", "ieee"), LAYOUTS.items()):
            of_kind = {"PRECISION": "ieee" if kind == "ieee" else "tf32", "FLAT": layout == "few channels"}
            listed_as = _listed_as(kind, scattered)
            for hopper in (False, True):
                for config in table.get(listed_as + HOPPER * hopper, []):
                    yield variant(kernel, kind, layout, constants | of_kind, config, hopper)
                    best = hopper or listed_as + HOPPER not in table
                    if kind == "half" and best and kernel in _WRITTEN:
                        described = constants | of_kind | {"DESCRIPTOR": True}
                        yield variant(kernel, kind, layout, described, config, True, _WRITTEN[kernel])
                    if kernel is conv_weight_grads_kernel and not is_large(config):
                        both = constants | of_kind | {"HAS_WEIGHT": True}
                        yield variant(kernel, kind, layout, both, config, hopper)
    constants = {"HAS_SCORES": True, "HAS_WEIGHT": True, "ACCUMULATE": True}
    yield variant(
        conv_sum_parts_kernel, "half", "channels_last", constants, Config({"BLOCK": SUM_BLOCK}, 4, 3)
    )
    types = {"words_ptr": "*i32", "realigned_ptr": "*i32", "TAPS": "constexpr", "BLOCK": "constexpr"}
    signature = {name: types.get(name, "i32") for name in realign_kernel.arg_names}
    constants = {"TAPS": 9, "BLOCK": _REALIGN_BLOCK}
    yield Variant("realign", realign_kernel, signature, constants, Config({}, 4, 3), tensor_cores=False)


# What a descriptor may describe.
_WRITTEN = {conv_fwd_kernel: "y_ptr", conv_dx_kernel: "dx_ptr"}
