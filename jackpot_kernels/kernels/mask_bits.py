"""Packed mask words to bits in registers.

Bit i of word w belongs to the weight at logical row-major index 32 * w + i. A tile of a matrix reads one word
for 32 of its weights, or two where rows do not start on a word.
"""

import triton
import triton.language as tl


@triton.jit
def keep_bits(words_ptr, offsets, inside):
    """Return which of the weights at ``offsets`` are kept; False where not ``inside``.

    Args:
        words_ptr: packed mask, int32.
        offsets: logical indices, of any shape; int64 where they can pass 2**31.
        inside: which offsets may be read.
    """
    words = tl.load(words_ptr + (offsets >> 5), mask=inside, other=0)
    return ((words >> (offsets & 31).to(tl.int32)) & 1) != 0


@triton.jit
def bit_values(words_ptr, size):
    """Return ``1 << arange(32)`` as if it came from memory; call it once, outside of a kernel's loop.

    Triton makes an operand of a product in the very registers where the product wants it if all that it is
    made of was loaded. With an ``arange`` in it, a masked weight went through shared memory in each step: a
    third more instructions, and a barrier more, in a matmul's loop for sm_90 (tests/test_triton_compile.py).

    Args:
        words_ptr: anything that is not read.
        size: of anything, so that the compiler does not know it is never negative.
    """
    o_bit = tl.arange(0, 32)
    return tl.load(words_ptr + o_bit, mask=tl.zeros([32], tl.int32) > size, other=1 << o_bit)


@triton.jit
def keep_tile(
    words_ptr,
    bits,
    rows,
    first_column,
    num_rows,
    num_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Return which weights of a tile of a row-major matrix are kept; False outside the matrix.

    Rows must start on a word: ``num_columns``, ``first_column`` and ``BLOCK_COLUMNS`` are multiples of 32.

    Args:
        words_ptr: packed mask, int32.
        bits: what ``bit_values`` returns.  # [32]
        rows: of the tile, int64 where indices can pass 2**31.  # [BLOCK_ROWS]
        first_column: of the tile.
    """
    columns = first_column // 32 + tl.arange(0, BLOCK_COLUMNS // 32)
    inside = (rows < num_rows)[:, None] & (columns < num_columns // 32)[None, :]
    words = tl.load(words_ptr + rows[:, None] * (num_columns // 32) + columns[None, :], mask=inside, other=0)
    return _unpacked(words, bits, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def keep_tile_anywhere(
    words_ptr,
    bits,
    rows,
    first_column,
    num_rows,
    num_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Return ``keep_tile`` of a matrix with any number of columns; what it says outside means nothing."""
    columns = first_column + 32 * tl.arange(0, BLOCK_COLUMNS // 32)
    index = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    last = (tl.cast(num_rows, tl.int64) * num_columns - 1) >> 5
    low = tl.load(words_ptr + (index >> 5), mask=(index >> 5) <= last, other=0)
    high = tl.load(words_ptr + (index >> 5) + 1, mask=(index >> 5) < last, other=0)
    pair = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return _unpacked((pair >> (index & 31)).to(tl.int32), bits, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit(do_not_specialize=["size", "C"])
def realign_kernel(
    words_ptr,  # packed mask of [F, C, TAPS]
    realigned_ptr,  # [F, TAPS, ceil(C / 32)]
    size,  # words that are written
    C,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put the bits of a tap's channels one after the other, and start each tap on a word."""
    num_words = tl.cdiv(C, 32)  # of a tap
    o_word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    output, tap = o_word // num_words // TAPS, o_word // num_words % TAPS
    channel = (o_word % num_words * 32)[:, None] + tl.arange(0, 32)[None, :]
    index = ((output * C)[:, None] + channel) * TAPS + tap[:, None]
    inside = o_word < size
    b_keep = keep_bits(words_ptr, index, inside[:, None] & (channel < C))  # [BLOCK, 32]
    words = tl.sum(b_keep.to(tl.int32) << tl.arange(0, 32)[None, :], 1)
    tl.store(realigned_ptr + o_word, words, mask=inside)


@triton.jit
def _unpacked(words, bits, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Return the bits of words [BLOCK_ROWS, BLOCK_COLUMNS / 32] as a tile [BLOCK_ROWS, BLOCK_COLUMNS]."""
    kept = words[:, :, None] & bits[None, None, :]
    return tl.reshape(kept, [BLOCK_ROWS, BLOCK_COLUMNS]) != 0
