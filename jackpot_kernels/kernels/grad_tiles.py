"""What leaves the registers of a convolution's weight gradients, and the parts that sums are split into."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jackpot_kernels.kernels.conv_places import kernel_size
from jackpot_kernels.kernels.mask_bits import keep_bits


@triton.jit
def write_tile(
    b_g,
    index,
    o_w,
    inside,
    o_part,
    parts_ptr,
    w_ptr,
    words_ptr,
    dscores_ptr,
    dweight_ptr,
    HAS_SCORES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Write G at logical indices to the part of it that starts at ``o_part``, or what is made of it."""
    if HAS_PARTS:
        tl.store(parts_ptr + o_part + index, b_g, mask=inside)
    else:
        # Half a tile at a time: the addresses of a whole one do not fit in registers.
        for i in tl.static_range(2):
            write_grads(
                halves(b_g)[i],
                halves(index)[i],
                halves(o_w)[i],
                halves(inside)[i],
                w_ptr,
                words_ptr,
                dscores_ptr,
                dweight_ptr,
                HAS_SCORES,
                HAS_WEIGHT,
                ACCUMULATE,
            )


@triton.jit
def halves(tile):  # [M, N] -> [M, N / 2], [M, N / 2]
    pairs = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    return tl.split(tl.permute(pairs, [0, 2, 1]))


@triton.jit
def write_grads(
    b_g,
    index,
    o_w,
    inside,
    w_ptr,
    words_ptr,
    dscores_ptr,
    dweight_ptr,
    HAS_SCORES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Write G at logical indices as ``G * weight`` (Eq. 6, 18), as ``G * mask`` (Eq. 31), or as both."""
    if HAS_SCORES:
        b_scores = b_g * tl.load(w_ptr + o_w, mask=inside, other=0).to(tl.float32)
        if ACCUMULATE:
            b_scores += tl.load(dscores_ptr + index, mask=inside, other=0)
        tl.store(dscores_ptr + index, b_scores, mask=inside)
    if HAS_WEIGHT:
        b_weight = tl.where(keep_bits(words_ptr, index, inside), b_g, 0)
        tl.store(dweight_ptr + index, b_weight.to(dweight_ptr.dtype.element_ty), mask=inside)


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


# Sums over positions are split until so many programs share them: two for each multiprocessor of an H200.
_PROGRAMS = 264
# Elements of all parts of a sum: memory is what these kernels save.
_MOST_PARTS = 2**21
# Blocks of positions that a part of a sum has at least.
_LEAST_BLOCKS = 4
# Elements of G that a program adds up.
SUM_BLOCK = 1024


def split_sum(num_places: int, num_weights: int, num_tiles: int, block: int) -> tuple[int, int]:
    """Return into how many parts a sum over places is split, and how many places a part has.

    A part is a number of blocks of places.
    """
    blocks = max(1, triton.cdiv(num_places, block))
    fitting = max(1, min(_PROGRAMS // num_tiles, _MOST_PARTS // num_weights))
    wanted = min(fitting, triton.cdiv(blocks, _LEAST_BLOCKS))
    part = triton.cdiv(blocks, wanted)
    return int(triton.cdiv(blocks, part)), int(part * block)


def new_parts(num_parts: int, weight: Tensor) -> Tensor:
    """Return room for parts of G, each as ``weight``."""
    return weight.new_empty(num_parts, weight.numel(), dtype=torch.float32)


def sum_parts_(
    parts: Tensor,
    weight: Tensor,
    words: Tensor | None,
    dscores: Tensor | None,
    dweight: Tensor | None,
    accumulate: bool,
) -> None:
    """Write what is made of G, the sum of its parts."""
    conv_sum_parts_kernel[(triton.cdiv(weight.numel(), SUM_BLOCK),)](
        parts,
        weight,
        words,
        dscores,
        dweight,
        weight.numel(),
        len(parts),
        weight.shape[1],
        *weight.stride(),
        **kernel_size(weight),
        HAS_SCORES=dscores is not None,
        HAS_WEIGHT=dweight is not None,
        ACCUMULATE=accumulate,
        BLOCK=SUM_BLOCK,
    )
