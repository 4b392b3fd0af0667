"""The masked matmul, its gradient to the input, and its gradients to scores, weight and bias.

The two products with a masked weight are one kernel: ``y = x @ A.T`` with ``A = weight * mask`` forward, and
with ``A = (weight * mask).T`` for the input's gradient. It computes ``A @ x.T``, because a left operand may
come from registers, where the mask is applied; a right one would have to go back through shared memory.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from jackpot_kernels.kernels.availability import launching_on
from jackpot_kernels.kernels.descriptors import describe, has_whole_rows
from jackpot_kernels.kernels.dot import dot
from jackpot_kernels.kernels.mask_bits import bit_values, keep_tile, keep_tile_anywhere
from jackpot_kernels.kernels.tuning import HOPPER, Config, Variant, choose, listed


# The number of tokens changes from call to call, so it is no reason to compile anew.
@triton.jit(do_not_specialize=["N"])
def masked_matmul_kernel(
    x_ptr,  # [N, Q]; where DESCRIPTORS, this, w and y describe tiles to the device's copy engine
    w_ptr,  # [P, Q], or [Q, P] where TRANSPOSED
    words_ptr,
    bias_ptr,  # [P]
    y_ptr,  # [N, P], or [SPLITS, N, P] in float32
    N,
    P,
    Q,
    stride_xn,
    stride_xq,
    stride_wp,
    stride_wq,
    TRANSPOSED: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Write a tile of ``y = x @ A.T + bias`` (Eq. 4); ``A = weight * mask``, transposed where TRANSPOSED.

    Of SPLITS programs each writes the part that every SPLITS-th block of columns adds.
    """
    i_p, i_n = grouped_tile(tl.program_id(0), tl.cdiv(P, BLOCK_P), tl.cdiv(N, BLOCK_N), GROUP)
    i_split = tl.program_id(1)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    o_q = (i_split * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    m_p, m_n = o_p < P, o_n < N
    if not DESCRIPTORS:
        p_w = w_ptr + o_p[:, None] * stride_wp + o_q[None, :] * stride_wq
        p_x = x_ptr + o_n[None, :] * stride_xn + o_q[:, None] * stride_xq

    bits = bit_values(words_ptr, N)
    b_y = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for q in range(i_split * BLOCK_Q, Q, SPLITS * BLOCK_Q):
        if DESCRIPTORS:
            b_w = tl.trans(w_ptr.load([q, i_p * BLOCK_P])) if TRANSPOSED else w_ptr.load([i_p * BLOCK_P, q])
            b_x = tl.trans(x_ptr.load([i_n * BLOCK_N, q]))
        else:
            m_q = q + tl.arange(0, BLOCK_Q) < Q
            b_w = tl.load(p_w, mask=m_p[:, None] & m_q[None, :], other=0)  # [BLOCK_P, BLOCK_Q]
            b_x = tl.load(p_x, mask=m_q[:, None] & m_n[None, :], other=0)  # [BLOCK_Q, BLOCK_N]
            p_w += tl.cast(SPLITS * BLOCK_Q, tl.int64) * stride_wq
            p_x += tl.cast(SPLITS * BLOCK_Q, tl.int64) * stride_xq
        b_keep = kept_block(
            words_ptr, bits, i_p * BLOCK_P, q, P, Q, TRANSPOSED, WHOLE_WORDS, BLOCK_P, BLOCK_Q
        )
        b_y = dot(tl.where(b_keep, b_w, 0), b_x, b_y, PRECISION)

    if HAS_BIAS:
        b_y += tl.load(bias_ptr + o_p, mask=m_p, other=0).to(tl.float32)[:, None]
    if DESCRIPTORS:
        y_ptr.store([i_n * BLOCK_N, i_p * BLOCK_P], tl.trans(b_y.to(y_ptr.dtype)))
    else:
        p_y = y_ptr + (i_split * N + o_n[None, :]) * P + o_p[:, None]
        tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_p[:, None] & m_n[None, :])


@triton.jit
def kept_block(
    words_ptr,
    bits,
    p,
    q,
    P,
    Q,
    TRANSPOSED: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Return the mask of the block of A that starts at (p, q)."""
    if TRANSPOSED:
        rows, column = q + tl.arange(0, BLOCK_Q).to(tl.int64), p
        if WHOLE_WORDS:
            return tl.trans(keep_tile(words_ptr, bits, rows, column, Q, P, BLOCK_Q, BLOCK_P))
        return tl.trans(keep_tile_anywhere(words_ptr, bits, rows, column, Q, P, BLOCK_Q, BLOCK_P))
    rows, column = p + tl.arange(0, BLOCK_P).to(tl.int64), q
    if WHOLE_WORDS:
        return keep_tile(words_ptr, bits, rows, column, P, Q, BLOCK_P, BLOCK_Q)
    return keep_tile_anywhere(words_ptr, bits, rows, column, P, Q, BLOCK_P, BLOCK_Q)


@triton.jit(do_not_specialize=["size"])
def sum_splits_kernel(
    parts_ptr,  # [SPLITS, N, P]
    bias_ptr,  # [P]
    y_ptr,  # [N, P]
    size,  # N * P
    P,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the parts of a product, always in the same order."""
    o_y = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_y = o_y < size
    b_y = tl.load(parts_ptr + o_y, mask=m_y, other=0)
    for split in tl.static_range(1, SPLITS):
        b_y += tl.load(parts_ptr + split * size + o_y, mask=m_y, other=0)
    if HAS_BIAS:
        b_y += tl.load(bias_ptr + o_y % P, mask=m_y, other=0).to(tl.float32)
    tl.store(y_ptr + o_y, b_y.to(y_ptr.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["N"])
def weight_grads_kernel(
    g_ptr,  # [N, P], gradient of y; where DESCRIPTORS, this and the next describe tiles
    x_ptr,  # [N, Q]
    w_ptr,  # [P, Q]
    words_ptr,
    dscores_ptr,  # [P, Q], float32
    dweight_ptr,  # [P, Q]
    dbias_ptr,  # [P]
    N,
    P,
    Q,
    stride_gn,
    stride_gp,
    stride_xn,
    stride_xq,
    stride_wp,
    stride_wq,
    HAS_SCORES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """``G = g.T @ x`` leaves as ``G * weight`` (Eq. 6, 18), as ``G * mask`` (Eq. 31), or as both."""
    i_p, i_q = grouped_tile(tl.program_id(0), tl.cdiv(P, BLOCK_P), tl.cdiv(Q, BLOCK_Q), GROUP)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    m_p, m_q = o_p < P, o_q < Q
    if not DESCRIPTORS:
        p_g = g_ptr + o_p[:, None] * stride_gp + o_n[None, :] * stride_gn
        p_x = x_ptr + o_n[:, None] * stride_xn + o_q[None, :] * stride_xq
    m_w = m_p[:, None] & m_q[None, :]
    p_w = w_ptr + o_p[:, None] * stride_wp + o_q[None, :] * stride_wq
    if HAS_SCORES and EARLY:
        b_w = tl.load(p_w, mask=m_w, other=0)

    b_grad = tl.zeros([BLOCK_P, BLOCK_Q], tl.float32)
    b_bias = tl.zeros([BLOCK_P], tl.float32)
    for n in range(0, N, BLOCK_N):
        if DESCRIPTORS:
            b_g = tl.trans(g_ptr.load([n, i_p * BLOCK_P]))
            b_x = x_ptr.load([n, i_q * BLOCK_Q])
        else:
            m_n = n + tl.arange(0, BLOCK_N) < N
            b_g = tl.load(p_g, mask=m_p[:, None] & m_n[None, :], other=0)  # [BLOCK_P, BLOCK_N]
            b_x = tl.load(p_x, mask=m_n[:, None] & m_q[None, :], other=0)  # [BLOCK_N, BLOCK_Q]
            p_g += tl.cast(BLOCK_N, tl.int64) * stride_gn
            p_x += tl.cast(BLOCK_N, tl.int64) * stride_xn
        b_grad = dot(b_g, b_x, b_grad, PRECISION)
        if HAS_BIAS:  # noqa: SIM102 (the outer one is decided as the kernel is compiled)
            if i_q == 0:
                b_bias += tl.sum(b_g.to(tl.float32), 1)

    o_w = o_p[:, None] * Q + o_q[None, :]
    if HAS_SCORES:
        if not EARLY:
            b_w = tl.load(p_w, mask=m_w, other=0)
        b_scores = b_grad * b_w.to(tl.float32)
        if ACCUMULATE:
            b_scores += tl.load(dscores_ptr + o_w, mask=m_w, other=0)
        tl.store(dscores_ptr + o_w, b_scores, mask=m_w)
    if HAS_WEIGHT:
        b_keep = kept_block(
            words_ptr,
            1 << tl.arange(0, 32),
            i_p * BLOCK_P,
            i_q * BLOCK_Q,
            P,
            Q,
            False,
            WHOLE_WORDS,
            BLOCK_P,
            BLOCK_Q,
        )
        tl.store(dweight_ptr + o_w, tl.where(b_keep, b_grad, 0).to(dweight_ptr.dtype.element_ty), mask=m_w)
    if HAS_BIAS:  # noqa: SIM102
        if i_q == 0:
            tl.store(dbias_ptr + o_p, b_bias.to(dbias_ptr.dtype.element_ty), mask=m_p)


@triton.jit
def grouped_tile(i_tile, num_rows, num_columns, GROUP: tl.constexpr):
    """Return row and column of a tile, in an order in which L2 still holds what neighbours read."""
    first = i_tile // (GROUP * num_columns) * GROUP
    rows = tl.minimum(num_rows - first, GROUP)
    i_in_group = i_tile % (GROUP * num_columns)
    return first + i_in_group % rows, i_in_group // rows


def _matmul_config(
    p: int, n: int, q: int, num_warps: int, num_stages: int, *, splits: int = 1, descriptors: bool = False
) -> Config:
    blocks = {"BLOCK_P": p, "BLOCK_N": n, "BLOCK_Q": q}
    how = {"SPLITS": splits, "GROUP": 8, "DESCRIPTORS": int(descriptors)}
    return Config(blocks | how, num_warps, num_stages)


def _grads_config(
    p: int, q: int, n: int, num_warps: int, num_stages: int, *, descriptors: bool = False, early: bool = False
) -> Config:
    blocks = {"BLOCK_P": p, "BLOCK_Q": q, "BLOCK_N": n}
    how = {"GROUP": 8, "DESCRIPTORS": int(descriptors), "EARLY": int(early)}
    return Config(blocks | how, num_warps, num_stages)


# By what limits them: the weights' bytes where tokens are few, so their columns are split and every
# multiprocessor reads some; elements that cannot be copied 16 bytes at a time; the room that float32 takes.
MATMUL_CONFIGS = {
    "tokens <= 16": [
        *(_matmul_config(64, 16, 64, 4, 6, splits=splits) for splits in (4, 1, 8)),
        _matmul_config(32, 16, 128, 4, 5),
    ],
    "tokens <= 16, Hopper": [
        *(_matmul_config(64, 16, 128, 4, 4, splits=splits) for splits in (4, 1, 8)),
        # 4096 rows by 32 are 128 programs, about one a multiprocessor, and no second launch adds parts.
        _matmul_config(32, 16, 256, 4, 4),
        _matmul_config(32, 16, 128, 4, 5),
    ],
    "tokens <= 64": [
        *(_matmul_config(64, 64, 64, 4, 4, splits=splits) for splits in (4, 1, 8)),
        _matmul_config(32, 64, 128, 4, 4),
    ],
    "many tokens": [_matmul_config(128, 128, 32, 8, 4), _matmul_config(64, 128, 32, 4, 4)],
    "many tokens, Hopper": [
        # Several programs share a multiprocessor: one masks while the matrix unit serves another.
        _matmul_config(64, 128, 64, 4, 3, descriptors=True),
        _matmul_config(64, 256, 64, 4, 2, descriptors=True),
        # A program has one for itself, and more on its way: with 256 tokens, a step of the first took an H100
        # 0.85 us, about what memory takes to answer.
        _matmul_config(64, 128, 64, 4, 6, descriptors=True),
        _matmul_config(128, 256, 64, 8, 4, descriptors=True),
        _matmul_config(64, 128, 64, 4, 4),
    ],
    "float32": [_matmul_config(128, 64, 32, 8, 3)],
    "unaligned": [_matmul_config(64, 64, 32, 8, 2)],
}
GRADS_CONFIGS = {
    "tokens <= 64": [
        _grads_config(64, 128, 32, 4, 2),
        # The weight is most of what is read: on its way while the little product is computed, and for more
        # programs at a time, as a tile of half or a quarter takes 132 or 80 registers instead of 238.
        _grads_config(32, 128, 32, 4, 2, early=True),
        _grads_config(32, 64, 32, 4, 2, early=True),
    ],
    "many tokens": [_grads_config(128, 128, 64, 8, 3), _grads_config(64, 128, 64, 4, 4)],
    "many tokens, Hopper": [
        _grads_config(128, 128, 64, 8, 3),
        _grads_config(128, 128, 64, 8, 4, descriptors=True),
        _grads_config(64, 128, 64, 4, 4),
    ],
    "of the weight": [_grads_config(64, 64, 64, 4, 3)],
    "float32": [_grads_config(128, 64, 32, 8, 3)],
    "exact": [_grads_config(64, 64, 16, 8, 3)],
    "unaligned": [_grads_config(64, 64, 32, 8, 2)],
}

_SUM_BLOCK = 1024


def masked_matmul(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Return ``x @ (weight * mask).T + bias``, or ``x @ (weight * mask)`` if ``transposed``.

    Args:
        x: float32, bfloat16 or float16.  # [N, K], or [N, M] if transposed
        weight: the dtype of ``x``.  # [M, K]
        words: packed mask, int32.  # [ceil(M * K / 32)]
        bias: the dtype of ``x``.  # [M]

    Returns:
        The dtype of ``x``, accumulated in float32.  # [N, M], or [N, K] if transposed
    """
    x, weight = _with_unit_stride(x), _with_unit_stride(weight)
    bias = None if bias is None else bias.contiguous()
    a = weight.t() if transposed else weight  # [P, Q]
    (num_p, num_q), num_n = a.shape, x.shape[0]
    y = x.new_empty(num_n, num_p)
    if num_n == 0:
        return y
    whole_words = weight.shape[1] % 32 == 0
    aligned = whole_words and _aligned(x, weight)
    precision = _precision(x)

    def run(config: Config) -> None:
        splits = config.values["SPLITS"]
        parts = y if splits == 1 else x.new_empty(splits, num_n, num_p, dtype=torch.float32)
        tiles = triton.cdiv(num_p, config.values["BLOCK_P"]) * triton.cdiv(num_n, config.values["BLOCK_N"])
        block = config.values
        p, q, n = block["BLOCK_P"], block["BLOCK_Q"], block["BLOCK_N"]
        masked_matmul_kernel[(tiles, splits)](
            _operand(x, n, q, config),
            _operand(weight, *((q, p) if transposed else (p, q)), config),
            words,
            bias,
            _operand(parts, n, p, config),
            num_n,
            num_p,
            num_q,
            *x.stride(),
            *a.stride(),
            TRANSPOSED=transposed,
            WHOLE_WORDS=whole_words,
            HAS_BIAS=bias is not None and splits == 1,
            PRECISION=precision,
            **config.options,
        )
        if splits > 1:
            sum_splits_kernel[(triton.cdiv(y.numel(), _SUM_BLOCK),)](
                parts, bias, y, y.numel(), num_p, HAS_BIAS=bias is not None, SPLITS=splits, BLOCK=_SUM_BLOCK
            )

    kind = _kind(x, aligned, "tokens <= 16", "tokens <= 64")
    configs = _usable(listed(MATMUL_CONFIGS, kind, x.device), x, weight, y)
    with launching_on(x.device):
        key = (x.dtype, precision, transposed, len(configs), *_sizes(num_n, a))
        run(choose("masked_matmul", key, configs, run))
    return y


def weight_grads_(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    words: Tensor | None,
    dscores: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    accumulate: bool = False,
) -> None:
    """Write gradients of a masked matmul, each where an output is given; ``G = grad.T @ x`` is never written.

    dL/dscores = G * weight (Eq. 6, 18);  dL/dweight = G * mask (Eq. 31);  dL/dbias = sum of grad over tokens

    Args:
        grad: gradient of the product; float32, bfloat16 or float16.  # [N, M]
        x: the dtype of ``grad``.  # [N, K]
        weight: float32, bfloat16 or float16.  # [M, K]
        words: packed mask, int32, needed for ``dweight``.  # [ceil(M * K / 32)]
        dscores: float32, contiguous.  # [M, K]
        dweight: contiguous.  # [M, K]
        dbias: contiguous.  # [M]
        accumulate: add to ``dscores`` what is otherwise written to it.
    """
    grad, x, weight = (_with_unit_stride(t) for t in (grad, x, weight))
    num_p, num_q = weight.shape
    whole_words = num_q % 32 == 0
    aligned = whole_words and num_p % 16 == 0 and _aligned(grad, x, weight)
    precision = _precision(x)

    def run(config: Config, dscores: Tensor | None, accumulate: bool) -> None:
        tiles = triton.cdiv(num_p, config.values["BLOCK_P"]) * triton.cdiv(num_q, config.values["BLOCK_Q"])
        block = config.values
        weight_grads_kernel[(tiles,)](
            _operand(grad, block["BLOCK_N"], block["BLOCK_P"], config),
            _operand(x, block["BLOCK_N"], block["BLOCK_Q"], config),
            weight,
            words,
            dscores,
            dweight,
            dbias,
            x.shape[0],
            num_p,
            num_q,
            *grad.stride(),
            *x.stride(),
            *weight.stride(),
            HAS_SCORES=dscores is not None,
            HAS_WEIGHT=dweight is not None,
            HAS_BIAS=dbias is not None,
            WHOLE_WORDS=whole_words,
            ACCUMULATE=accumulate,
            PRECISION=precision,
            **config.options,
        )

    def rehearse(config: Config) -> None:
        """Add to scores that nobody needs."""
        run(config, torch.empty_like(dscores) if accumulate and dscores is not None else dscores, accumulate)

    kind = _kind(x, aligned, "tokens <= 64", "tokens <= 64")
    if precision == "ieee":
        kind = "exact"
    elif dweight is not None and "tokens" in kind:
        kind = "of the weight"
    configs = _usable(listed(GRADS_CONFIGS, kind, x.device), grad, x)
    with launching_on(x.device):
        key = (x.dtype, weight.dtype, precision, accumulate, len(configs), *_sizes(x.shape[0], weight))
        run(choose("weight_grads", key, configs, rehearse), dscores, accumulate)


def _kind(x: Tensor, aligned: bool, few: str, some: str) -> str:
    """Return which list of configurations serves a problem."""
    if not aligned:
        return "unaligned"
    if x.dtype == torch.float32:
        return "float32"
    return few if x.shape[0] <= 16 else some if x.shape[0] <= 64 else "many tokens"


def _usable(configs: list[Config], *matrices: Tensor) -> list[Config]:
    """Return the configurations that serve matrices; their number belongs to what a choice depends on."""
    whole = all(map(has_whole_rows, matrices))
    return [config for config in configs if whole or not config.values["DESCRIPTORS"]]


def _operand(matrix: Tensor, rows: int, columns: int, config: Config) -> Tensor | TensorDescriptor:
    """Return what a kernel reads a matrix from, or writes it to."""
    return describe(matrix, rows, columns) if config.values["DESCRIPTORS"] else matrix


def _sizes(num_tokens: int, matrix: Tensor) -> tuple[int, ...]:
    """Return what a choice depends on: the next power of two to the tokens, the matrix's shape and order."""
    return 1 << max(num_tokens - 1, 0).bit_length(), *matrix.shape, int(matrix.stride(0) != 1)


def _with_unit_stride(matrix: Tensor) -> Tensor:
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def _aligned(*matrices: Tensor) -> bool:
    """Tell whether the kernel may copy 16 bytes at a time."""
    return all(
        m.data_ptr() % 16 == 0 and all(stride == 1 or stride % 16 == 0 for stride in m.stride())
        for m in matrices
    )


def _precision(x: Tensor) -> str:
    """Return how float32 is multiplied, as PyTorch is told to; other dtypes have one way only."""
    return (
        "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" or x.dtype != torch.float32 else "ieee"
    )


def variants() -> Iterator[Variant]:
    """Yield every kernel under every configuration, as a launch would compile it."""
    for kind, configs in MATMUL_CONFIGS.items():
        for precision, transposed, config in product(_precisions(kind), (False, True), configs):
            yield _matmul_variant(kind, precision, transposed, config)
    for kind, configs in GRADS_CONFIGS.items():
        for config in configs:
            yield _grads_variant(kind, _precisions(kind)[0], config)
    constants = {"HAS_BIAS": True, "SPLITS": 8, "BLOCK": _SUM_BLOCK}
    pointers = {"parts_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16"}
    signature = _signature(sum_splits_kernel, pointers, constants)
    yield Variant("sum_splits", sum_splits_kernel, signature, constants, Config({}, 4, 1), tensor_cores=False)


def _precisions(kind: str) -> tuple[str, ...]:
    return ("tf32", "ieee") if kind == "float32" else ("ieee",) if kind == "exact" else ("tf32",)


def _matmul_variant(kind: str, precision: str, transposed: bool, config: Config) -> Variant:
    dtype = "*fp32" if kind == "float32" else "*bf16"
    split = config.values["SPLITS"] > 1
    pointers = dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "y_ptr"), dtype) | {"words_ptr": "*i32"}
    if split:
        pointers["y_ptr"] = "*fp32"
    block = config.values
    if block["DESCRIPTORS"]:
        rows, columns = ("BLOCK_Q", "BLOCK_P") if transposed else ("BLOCK_P", "BLOCK_Q")
        pointers["x_ptr"] = f"tensordesc<bf16[{block['BLOCK_N']}, {block['BLOCK_Q']}]>"
        pointers["w_ptr"] = f"tensordesc<bf16[{block[rows]}, {block[columns]}]>"
        pointers["y_ptr"] = f"tensordesc<bf16[{block['BLOCK_N']}, {block['BLOCK_P']}]>"
    constants = {
        "stride_xq": 1,
        "stride_wp" if transposed else "stride_wq": 1,
        "TRANSPOSED": transposed,
        "WHOLE_WORDS": kind != "unaligned",
        "HAS_BIAS": not (transposed or split),
        "PRECISION": precision,
    }
    name = f"masked_matmul{' transposed' if transposed else ''}"
    return _variant(name, masked_matmul_kernel, pointers, constants, config, kind)


def _grads_variant(kind: str, precision: str, config: Config) -> Variant:
    dtype = "*fp32" if kind in ("float32", "exact") else "*bf16"
    pointers = dict.fromkeys(("g_ptr", "x_ptr", "w_ptr", "dweight_ptr", "dbias_ptr"), dtype)
    pointers |= {"words_ptr": "*i32", "dscores_ptr": "*fp32"}
    block = config.values
    if block["DESCRIPTORS"]:
        pointers["g_ptr"] = f"tensordesc<bf16[{block['BLOCK_N']}, {block['BLOCK_P']}]>"
        pointers["x_ptr"] = f"tensordesc<bf16[{block['BLOCK_N']}, {block['BLOCK_Q']}]>"
    constants = {
        "stride_gp": 1,
        "stride_xq": 1,
        "stride_wq": 1,
        "HAS_SCORES": True,
        "HAS_WEIGHT": "tokens" not in kind,
        "HAS_BIAS": True,
        "WHOLE_WORDS": kind != "unaligned",
        "ACCUMULATE": True,
        "PRECISION": precision,
    }
    return _variant("weight_grads", weight_grads_kernel, pointers, constants, config, kind)


def _variant(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    config: Config,
    kind: str,
) -> Variant:
    signature = _signature(kernel, pointers, constants | config.values)
    pointed = tuple(name for name, type in signature.items() if type.startswith("*"))
    numbers = () if kind == "unaligned" else tuple(n for n, t in signature.items() if t == "i32" and n != "N")
    exact = constants["PRECISION"] == "ieee"
    kind_name = f"{kind}, exact" if exact and kind != "exact" else kind
    return Variant(
        f"{name}, {kind_name}, {_brief(config)}",
        kernel,
        signature,
        constants,
        config,
        pointed + numbers,
        tensor_cores=not exact,
        minimum_architecture=90 if kind.endswith(HOPPER) else 80,
    )


def _signature(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    return {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names
    }


def _brief(config: Config) -> str:
    sizes = "x".join(str(size) for name, size in config.values.items() if name.startswith("BLOCK"))
    splits = f" in {config.values['SPLITS']}" if config.values.get("SPLITS", 1) > 1 else ""
    descriptors = ", descriptors" if config.values.get("DESCRIPTORS") else ""
    early = ", early" if config.values.get("EARLY") else ""
    return f"{sizes}{splits}{descriptors}{early}, {config.num_warps} warps, {config.num_stages} stages"
