"""What leaves the registers of a convolution's weight gradients."""

import triton
import triton.language as tl

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
