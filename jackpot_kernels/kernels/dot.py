"""The product of two tiles, accumulated in float32."""

import triton
import triton.language as tl

from jackpot_kernels.kernels.availability import interpreting

_INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """Return ``a @ b + accumulator``; ``PRECISION`` is "tf32" or "ieee", and matters to float32 only."""
    if _INTERPRETED:
        # Triton's interpreter multiplies the bits of bfloat16 numbers; float32 holds each of them exactly.
        a, b = a.to(tl.float32), b.to(tl.float32)
    if PRECISION == "ieee":
        # Block by block: a sum over 4096 columns, one after the other, was off by twelve times as much as the
        # library's. The last argument, which matters to 8-bit numbers only, keeps the compiler from making it
        # one chain again.
        accumulator += tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1])
    else:
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    return accumulator
