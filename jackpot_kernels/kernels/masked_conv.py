"""The masked convolution of two dimensions as implicit matmuls, and directly where it is depthwise.

With t a tap of the window, p a position of the output, and ``x[c, p, t]`` what tap t of the window at p sees
of channel c, zero where that is padding:

    y[f, p] = sum over c and t of (w * mask)[f, c, t] x[c, p, t] + bias[f]
    dx[c, q] = sum over f and t of (w * mask)[f, c, t] dy[f, p], where tap t of the window at p sees place q
    G[f, c, t] = sum over p of dy[f, p] x[c, p, t];  dscores = G * w;  dweight = G * mask

The masked weight is the left operand of its products, which may come from registers. A step of their sums
takes one tap of BLOCK_K channels, or, FLAT, BLOCK_K pairs of channel and tap where channels are few. The mask
is put into that order first, so that a step reads a word for 32 weights. Tensors have any strides; C inputs
and F outputs are those of one group; offsets within an image or the weight fit in 32 bits.
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
from jackpot_kernels.kernels.descriptors import describe, has_whole_rows
from jackpot_kernels.kernels.dot import dot
from jackpot_kernels.kernels.grad_tiles import write_grads, write_tile
from jackpot_kernels.kernels.mask_bits import bit_values, keep_bits, keep_tile, realign_kernel
from jackpot_kernels.kernels.masked_conv_boxes import (
    GRADS_CONFIGS,
    PRODUCT_CONFIGS,
    Geometry,
    box_of,
    boxable,
    boxed_conv_,
    boxed_conv_grads_,
    is_boxed,
    is_large,
    num_boxes,
)
from jackpot_kernels.kernels.tuning import HOPPER, Config, Variant, choose, listed

# What makes no better code where it is 1 or a multiple of 16: so a network needs fewer kernels compiled.
_UNSPECIALIZED = ["N", "H", "W", "P", "Q", "pad_h", "pad_w", "part"]


# What puts a place outside of every image, added or subtracted: a comparison less for each of them.
FAR = tl.constexpr(-(2**31))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
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


@triton.jit(do_not_specialize=_UNSPECIALIZED)
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


@triton.jit(do_not_specialize=_UNSPECIALIZED)
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


@triton.jit(do_not_specialize=["size", "num_parts"])
def conv_sum_parts_kernel(
    parts_ptr,  # [PARTS, F, C, KERNEL_H, KERNEL_W]
    w_ptr,  # [F, C, KERNEL_H, KERNEL_W]
    words_ptr,
    dscores_ptr,
    dweight_ptr,
    size,
    num_parts,
    C,
    stride_wo,
    stride_wc,
    stride_wr,
    stride_ws,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the parts of G, always in the same order, and write what is made of it."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    b_g = tl.zeros([BLOCK], tl.float32)
    for i in range(num_parts):
        b_g += tl.load(parts_ptr + tl.cast(i, tl.int64) * size + index, mask=inside, other=0)
    o, c, tap = index // (C * TAPS), index // TAPS % C, index % TAPS
    o_w = o * stride_wo + c * stride_wc + tap // KERNEL_W * stride_wr + tap % KERNEL_W * stride_ws
    write_grads(
        b_g,
        index,
        o_w,
        inside,
        w_ptr,
        words_ptr,
        dscores_ptr,
        dweight_ptr,
        HAS_SCORES,
        HAS_WEIGHT,
        ACCUMULATE,
    )


@triton.jit(do_not_specialize=_UNSPECIALIZED)
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


@triton.jit(do_not_specialize=_UNSPECIALIZED)
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


@triton.jit(do_not_specialize=_UNSPECIALIZED)
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


@triton.jit
def within(index, size):
    """Tell where ``0 <= index < size``, in one comparison."""
    return index.to(tl.uint32) < tl.cast(size, tl.uint32)


@triton.jit
def offset(row, column, stride_row, stride_column):
    """Return an offset of 64 bits: a place in the padding can be far from the image."""
    return row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column


@triton.jit
def positions(first, height, width, BLOCK: tl.constexpr):
    """Return image, row and column of BLOCK positions, which are counted through all images."""
    o_p = first + tl.arange(0, BLOCK)
    image = o_p // (height * width)
    within = (o_p - image * (height * width)).to(tl.int32)
    return image, within // width, within % width


@triton.jit
def advanced(image, row, column, height, width, BLOCK: tl.constexpr):
    """Return the positions BLOCK further on; carries cost less than the divisions of ``positions``."""
    rows = BLOCK // width
    column += BLOCK % width
    carry = (column >= width).to(tl.int32)
    column -= carry * width
    row += rows % height + carry
    carry = (row >= height).to(tl.int32)
    row -= carry * height
    image += rows // height + carry
    return image, row, column


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
# Sums over positions are split until so many programs share them: two for each multiprocessor of an H200.
_PROGRAMS = 264
# Elements of all parts of a sum: memory is what these kernels save.
_MOST_PARTS = 2**21
# Blocks of positions that a part of a sum has at least.
_LEAST_BLOCKS = 4
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
# Blocks that follow memory: along the channels, or, where these are scattered, along the places of an image.
DEPTHWISE_CONFIGS = {
    False: Config({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 3),
    True: Config({"BLOCK_M": 4, "BLOCK_N": 256}, 4, 3),
}
DEPTHWISE_WEIGHT_CONFIGS = {False: _config(32, 16, 8, 4, 3), True: _config(2, 16, 128, 8, 3)}


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
    groups, inputs, outputs = _channels(weight, geometry)
    num_places = y.numel() // y.shape[1]
    flat = inputs < _FEW_CHANNELS

    def run_depthwise(config: Config) -> None:
        depthwise_fwd_kernel[(_tiles(groups * outputs, num_places, config),)](
            x,
            weight,
            words,
            bias,
            y,
            *_sizes(x, y),
            groups * outputs,
            *x.stride(),
            *_strides_without_channel(weight),
            *y.stride(),
            *_window(geometry),
            MULTIPLIER=outputs,
            **_kernel_size(weight),
            HAS_BIAS=bias is not None,
            **config.options,
        )

    def run(config: Config) -> None:
        if is_boxed(config):
            boxed_conv_(y, x, weight, words, bias, geometry, False, config)
            return
        rows = _rows(y, groups)
        conv_fwd_kernel[(_tiles(outputs, num_places, config), groups)](
            x,
            weight,
            words,
            bias,
            y if rows is None else describe(rows, config.values["BLOCK_N"], config.values["BLOCK_M"]),
            *_sizes(x, y),
            inputs,
            outputs,
            *x.stride(),
            *weight.stride(),
            *y.stride(),
            *_window(geometry),
            **_kernel_size(weight),
            FLAT=flat,
            DESCRIPTOR=rows is not None,
            HAS_BIAS=bias is not None,
            PRECISION=_precision(x),
            **config.options,
        )

    bias = None if bias is None else bias.contiguous()
    with launching_on(x.device):
        if _is_depthwise(weight, groups):
            run_depthwise(DEPTHWISE_CONFIGS[_is_scattered((groups,), x, y)])
            return
        words = _realigned(words, weight, flat)
        configs = _pick(FORWARD_CONFIGS, x, flat or _is_scattered((inputs, outputs), x, weight))
        if not flat and boxable(x, weight, geometry, x, weight, y):
            configs = configs + PRODUCT_CONFIGS
        run(choose("masked_conv", _key(x, y, weight, geometry, configs), configs, run))


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
    groups, inputs, outputs = _channels(weight, geometry)
    num_images, _, height, width = dx.shape
    stride, _, dilation, _ = geometry
    flat = outputs < _FEW_CHANNELS

    def run_depthwise(config: Config) -> None:
        depthwise_dx_kernel[(_tiles(groups, num_images * height * width, config),)](
            grad,
            weight,
            words,
            dx,
            *_sizes(dx, grad),
            groups,
            *grad.stride(),
            *_strides_without_channel(weight),
            *dx.stride(),
            *_window(geometry),
            MULTIPLIER=outputs,
            **_kernel_size(weight),
            **config.options,
        )

    def run(config: Config) -> None:
        if is_boxed(config):
            boxed_conv_(dx, grad, weight, words, None, geometry, True, config)
            return
        rows = _rows(dx, groups) if math.prod(stride) == 1 else None
        # Places that are equal modulo the strides are the business of one program.
        places = num_images * triton.cdiv(height, stride[0]) * triton.cdiv(width, stride[1])
        conv_dx_kernel[(_tiles(inputs, places, config), groups, math.prod(stride))](
            grad,
            weight,
            words,
            dx if rows is None else describe(rows, config.values["BLOCK_N"], config.values["BLOCK_M"]),
            *_sizes(dx, grad),
            inputs,
            outputs,
            *grad.stride(),
            *weight.stride(),
            *dx.stride(),
            *_window(geometry),
            *(s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)),
            **_kernel_size(weight),
            FLAT=flat,
            DESCRIPTOR=rows is not None,
            PRECISION=_precision(grad),
            **config.options,
        )

    with launching_on(grad.device):
        if _is_depthwise(weight, groups):
            run_depthwise(DEPTHWISE_CONFIGS[_is_scattered((groups,), grad, dx)])
            return
        words = _realigned(words, weight, False)
        configs = _pick(INPUT_CONFIGS, grad, flat or _is_scattered((inputs, outputs), grad, weight))
        if not flat and boxable(dx, weight, geometry, grad, weight, dx):
            configs = configs + PRODUCT_CONFIGS
        run(choose("masked_conv_input_grad", _key(dx, grad, weight, geometry, configs), configs, run))


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
    groups, inputs, outputs = _channels(weight, geometry)
    num_places = grad.numel() // grad.shape[1]
    flat = inputs < _FEW_CHANNELS
    num_taps = weight.shape[2] * weight.shape[3]

    def sum_parts(parts: Tensor, dscores: Tensor | None, accumulate: bool) -> None:
        conv_sum_parts_kernel[(triton.cdiv(weight.numel(), 1024),)](
            parts,
            weight,
            words,
            dscores,
            dweight,
            weight.numel(),
            len(parts),
            inputs,
            *weight.stride(),
            **_kernel_size(weight),
            HAS_SCORES=dscores is not None,
            HAS_WEIGHT=dweight is not None,
            ACCUMULATE=accumulate,
            BLOCK=1024,
        )

    def run_depthwise(config: Config) -> None:
        tiles = _tiles(groups * outputs, num_taps, config)
        num_parts, part = _parts(num_places, weight.numel(), tiles, config.values["BLOCK_K"])
        parts = x.new_empty(num_parts, weight.numel(), dtype=torch.float32)
        depthwise_weight_grads_kernel[(tiles, num_parts)](
            grad,
            x,
            parts,
            *_sizes(x, grad),
            groups * outputs,
            *grad.stride(),
            *x.stride(),
            *_window(geometry),
            part,
            MULTIPLIER=outputs,
            **_kernel_size(weight),
            **config.options,
        )
        sum_parts(parts, dscores, accumulate)

    def new_parts(num_parts: int) -> Tensor | None:
        return x.new_empty(num_parts, weight.numel(), dtype=torch.float32) if num_parts > 1 else None

    def run_boxed(config: Config, dscores: Tensor | None, accumulate: bool) -> Tensor | None:
        size = grad.shape[0], *grad.shape[2:]
        boxes = num_boxes(size, box_of(*size, config.values["PLACES"], whole=True))
        num_parts, part = _parts(boxes, weight.numel(), _tiles(outputs, inputs, config) * num_taps, 1)
        parts = new_parts(num_parts)
        of_g = (dscores, dweight, parts, part)
        boxed_conv_grads_(grad, x, weight, words, *of_g, geometry, accumulate, config)
        return parts

    def run_unboxed(config: Config, dscores: Tensor | None, accumulate: bool) -> Tensor | None:
        tiles = _tiles(outputs, inputs * num_taps if flat else inputs, config) * (1 if flat else num_taps)
        num_parts, part = _parts(num_places, weight.numel(), tiles * groups, config.values["BLOCK_K"])
        parts = new_parts(num_parts)
        conv_weight_grads_kernel[(tiles, groups, num_parts)](
            grad,
            x,
            weight,
            words,
            dscores,
            dweight,
            parts,
            *_sizes(x, grad),
            inputs,
            outputs,
            groups,
            *grad.stride(),
            *x.stride(),
            *weight.stride(),
            *_window(geometry),
            part,
            **_kernel_size(weight),
            FLAT=flat,
            HAS_SCORES=dscores is not None,
            HAS_WEIGHT=dweight is not None,
            HAS_PARTS=parts is not None,
            ACCUMULATE=accumulate,
            PRECISION=_precision(x),
            **config.options,
        )
        return parts

    def run(config: Config, dscores: Tensor | None, accumulate: bool) -> None:
        launch = run_boxed if is_boxed(config) else run_unboxed
        parts = launch(config, dscores, accumulate)
        if parts is not None:
            sum_parts(parts, dscores, accumulate)

    def rehearse(config: Config) -> None:
        """Add to scores that nobody needs."""
        run(config, torch.empty_like(dscores) if accumulate and dscores is not None else dscores, accumulate)

    with launching_on(x.device):
        if _is_depthwise(weight, groups):
            run_depthwise(DEPTHWISE_WEIGHT_CONFIGS[_is_scattered((groups,), grad, x)])
            return
        configs = _pick(WEIGHT_CONFIGS, x, flat or _is_scattered((inputs, outputs), grad, x))
        if not flat and boxable(x, weight, geometry, grad, x):
            configs = configs + GRADS_CONFIGS
        if dweight is not None:
            configs = [config for config in configs if not is_large(config)]
        key = (*_key(x, grad, weight, geometry, configs), accumulate, dweight is not None)
        run(choose("masked_conv_weight_grads", key, configs, rehearse), dscores, accumulate)


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


def _is_depthwise(weight: Tensor, groups: int) -> bool:
    return weight.shape[1] == 1 and groups > 1


def _is_scattered(channels: tuple[int, ...], *tensors: Tensor) -> bool:
    """Tell whether the kernel cannot copy 16 bytes of channels at a time."""
    return any(count % 16 for count in channels) or any(
        t.stride(1) != 1 or t.data_ptr() % 16 != 0 or any(s % 16 for s in (t.stride(0), *t.stride()[2:]))
        for t in tensors
    )


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


def _tiles(rows: int, columns: int, config: Config) -> int:
    """Return how many blocks of BLOCK_M rows and BLOCK_N columns there are."""
    return int(triton.cdiv(rows, config.values["BLOCK_M"]) * triton.cdiv(columns, config.values["BLOCK_N"]))


def _parts(num_places: int, num_weights: int, num_tiles: int, block: int) -> tuple[int, int]:
    """Return into how many parts a sum over places is split, and how many places a part has.

    A part is a number of blocks of places.
    """
    blocks = max(1, triton.cdiv(num_places, block))
    fitting = max(1, min(_PROGRAMS // num_tiles, _MOST_PARTS // num_weights))
    wanted = min(fitting, triton.cdiv(blocks, _LEAST_BLOCKS))
    part = triton.cdiv(blocks, wanted)
    return int(triton.cdiv(blocks, part)), int(part * block)


def _sizes(x: Tensor, y: Tensor) -> tuple[int, ...]:
    """Return the number of images, and the sizes of an image before and after the convolution."""
    return x.shape[0], *x.shape[2:], *y.shape[2:]


def _window(geometry: Geometry) -> tuple[int, ...]:
    stride, padding, dilation, _ = geometry
    return (*stride, *padding, *dilation)


def _kernel_size(weight: Tensor) -> dict[str, int]:
    return {"KERNEL_H": weight.shape[2], "KERNEL_W": weight.shape[3]}


def _strides_without_channel(weight: Tensor) -> tuple[int, int, int]:
    return weight.stride(0), weight.stride(2), weight.stride(3)


def _key(x: Tensor, y: Tensor, weight: Tensor, geometry: Geometry, configs: list[Config]) -> tuple[Any, ...]:
    """Return what a choice depends on: dtypes, sizes, which dimension of the tensors is dense, and how many
    configurations serve them."""
    orders = tuple(t.stride(1) == 1 for t in (x, y, weight))
    num_images = 1 << max(x.shape[0] - 1, 0).bit_length()
    shapes = (num_images, *_sizes(x, y)[1:], *weight.shape)
    return (
        x.dtype,
        weight.dtype,
        _precision(x),
        *shapes,
        *_window(geometry),
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
        for kind, (layout, scattered) in product(("half", "tf32", "ieee"), _LAYOUTS.items()):
            of_kind = {"PRECISION": "ieee" if kind == "ieee" else "tf32", "FLAT": layout == "few channels"}
            listed_as = _listed_as(kind, scattered)
            for hopper in (False, True):
                for config in table.get(listed_as + HOPPER * hopper, []):
                    yield _variant(kernel, kind, layout, constants | of_kind, config, hopper)
                    best = hopper or listed_as + HOPPER not in table
                    if kind == "half" and best and kernel in _WRITTEN:
                        described = constants | of_kind | {"DESCRIPTOR": True}
                        yield _variant(kernel, kind, layout, described, config, hopper=True)
                    if kernel is conv_weight_grads_kernel and not is_large(config):
                        both = constants | of_kind | {"HAS_WEIGHT": True}
                        yield _variant(kernel, kind, layout, both, config, hopper)
    for layout in ("channels_last", "scattered"):
        constants = {"MULTIPLIER": 1}
        with_bias = constants | {"HAS_BIAS": True}
        config = DEPTHWISE_CONFIGS[_LAYOUTS[layout]]
        yield _variant(depthwise_fwd_kernel, "half", layout, with_bias, config)
        yield _variant(depthwise_dx_kernel, "half", layout, constants, config)
        config = DEPTHWISE_WEIGHT_CONFIGS[_LAYOUTS[layout]]
        yield _variant(depthwise_weight_grads_kernel, "half", layout, constants, config)
    constants = {"HAS_SCORES": True, "HAS_WEIGHT": True, "ACCUMULATE": True}
    yield _variant(conv_sum_parts_kernel, "half", "channels_last", constants, Config({"BLOCK": 1024}, 4, 3))
    types = {"words_ptr": "*i32", "realigned_ptr": "*i32", "TAPS": "constexpr", "BLOCK": "constexpr"}
    signature = {name: types.get(name, "i32") for name in realign_kernel.arg_names}
    constants = {"TAPS": 9, "BLOCK": _REALIGN_BLOCK}
    yield Variant("realign", realign_kernel, signature, constants, Config({}, 4, 3), tensor_cores=False)


# What a descriptor may describe.
_WRITTEN = {conv_fwd_kernel: "y_ptr", conv_dx_kernel: "dx_ptr"}
# Whether the channels of a layout are scattered, at least for the kernels.
_LAYOUTS = {"channels_last": False, "scattered": True, "few channels": True}


def _variant(
    kernel: Any, kind: str, layout: str, constants: dict[str, Any], config: Config, hopper: bool = False
) -> Variant:
    """Return a variant whose steps are 1, and whose channels, or else columns, are next to each other."""
    names, scattered = kernel.arg_names, _LAYOUTS[layout]
    dense = ("xw", "ws", "yq") if scattered else ("xc", "wc", "yo")
    ones = ["step_h", "step_w", "dilation_h", "dilation_w", *(f"stride_{dimension}" for dimension in dense)]
    constants = constants | {"KERNEL_H": 3, "KERNEL_W": 3} | {name: 1 for name in ones if name in names}
    types = {"words_ptr": "*i32", "dscores_ptr": "*fp32", "parts_ptr": "*fp32"}
    types |= dict.fromkeys(constants | config.values, "constexpr")
    element = "bf16" if kind == "half" else "fp32"
    signature = {name: types.get(name, f"*{element}" if name.endswith("_ptr") else "i32") for name in names}
    block, described = config.values, constants.get("DESCRIPTOR")
    if described:
        signature[_WRITTEN[kernel]] = f"tensordesc<{element}[{block['BLOCK_N']}, {block['BLOCK_M']}]>"
    pointers = tuple(name for name in names if signature[name].startswith("*"))
    numbers = tuple(name for name in names if name.startswith(("stride", *"CF")) and signature[name] == "i32")
    sizes = "x".join(map(str, block.values()))
    problem = f"{kind}, {layout}{HOPPER * hopper}{', descriptor' if described else ''}"
    problem += ", and of the weight" if constants.get("HAS_WEIGHT") else ""
    return Variant(
        f"{kernel.__name__}, {problem}, {sizes}, {config.num_warps} warps, {config.num_stages} stages",
        kernel,
        signature,
        constants,
        config,
        pointers if scattered else pointers + numbers,
        tensor_cores="PRECISION" in constants and constants["PRECISION"] != "ieee",
        minimum_architecture=90 if hopper else 80,
    )
