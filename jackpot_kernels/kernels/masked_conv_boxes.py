"""Products of a convolution whose window moves by one place, or is one place, with the copy engine of Hopper.

The engine copies boxes of images, rows and columns, shifted by a tap of the window, and fills in zeros for
what is outside: no thread computes an address of an image. Images and the weight are dense channels_last
tensors of 16 bits, of one group.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from jackpot_kernels.kernels.availability import has_copy_engine
from jackpot_kernels.kernels.conv_places import Geometry, num_tiles
from jackpot_kernels.kernels.descriptors import describe, has_whole_rows
from jackpot_kernels.kernels.dot import dot
from jackpot_kernels.kernels.grad_tiles import new_parts, split_sum, sum_parts_, write_tile
from jackpot_kernels.kernels.mask_bits import bit_values, keep_tile
from jackpot_kernels.kernels.tuning import Config, Variant

# What makes no better code where it is 1 or a multiple of 16.
_UNSPECIALIZED = ["P", "Q", "first_h", "first_w", "apart_h", "apart_w", "part"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def boxed_conv_kernel(
    x_ptr,  # describes boxes of [N, H, W, C], or of dy [N, H, W, F] where TRANSPOSED
    w_ptr,  # describes tiles of [F, TAPS * C]
    words_ptr,  # [F, TAPS, ceil(C / 32)]
    bias_ptr,  # [F]
    y_ptr,  # describes boxes of [N, P, Q, F], or of dx [N, P, Q, C] where TRANSPOSED
    P,
    Q,
    C,
    F,
    first_h,
    first_w,
    apart_h,
    apart_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write BLOCK_M channels of a box.

    Tap (r, s) of a window sees what is (first_h + r * apart_h, first_w + s * apart_w) further on.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    if TRANSPOSED:
        num_m, num_k = C, F
    else:
        num_m, num_k = F, C
    m = tl.program_id(0) % tl.cdiv(num_m, BLOCK_M) * BLOCK_M
    image, p, q = first_place(tl.program_id(0) // tl.cdiv(num_m, BLOCK_M), P, Q, BOX_N, BOX_H, BOX_W)
    bits = bit_values(words_ptr, P)

    b_y = tl.zeros([BLOCK_M, PLACES], tl.float32)
    for step in range(tl.cdiv(num_k, BLOCK_K) * TAPS):
        k, tap = step // TAPS * BLOCK_K, step % TAPS
        h, w = p + first_h + tap // KERNEL_W * apart_h, q + first_w + tap % KERNEL_W * apart_w
        b_x = tl.reshape(x_ptr.load([image, h, w, k]), [PLACES, BLOCK_K])
        # A tile that ends in the next tap's channels finds none of them kept.
        if TRANSPOSED:
            b_w = tl.trans(w_ptr.load([k, tap * C + m]))  # [BLOCK_M, BLOCK_K]
            rows = (k + tl.arange(0, BLOCK_K)) * TAPS + tap
            b_keep = tl.trans(keep_tile(words_ptr, bits, rows, m, F * TAPS, words_end(C), BLOCK_K, BLOCK_M))
        else:
            b_w = w_ptr.load([m, tap * C + k])
            rows = (m + tl.arange(0, BLOCK_M)) * TAPS + tap
            b_keep = keep_tile(words_ptr, bits, rows, k, F * TAPS, words_end(C), BLOCK_M, BLOCK_K)
        b_y = dot(tl.where(b_keep, b_w, 0), tl.trans(b_x), b_y, "tf32")

    if HAS_BIAS:
        o_m = m + tl.arange(0, BLOCK_M)
        b_y += tl.load(bias_ptr + o_m, mask=o_m < num_m, other=0).to(tl.float32)[:, None]
    b_y = tl.trans(b_y.to(y_ptr.dtype))
    y_ptr.store([image, p, q, m], tl.reshape(b_y, [BOX_N, BOX_H, BOX_W, BLOCK_M]))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def boxed_conv_grads_kernel(
    dy_ptr,  # describes boxes of [N, P, Q, F]
    x_ptr,  # describes boxes of [N, H, W, C]
    w_ptr,  # [F, C, KERNEL_H, KERNEL_W]
    words_ptr,
    dscores_ptr,  # as w, contiguous, float32
    dweight_ptr,  # as w, contiguous
    parts_ptr,  # [PARTS, as w], contiguous, float32
    P,
    Q,
    C,
    F,
    stride_wo,
    stride_wc,
    stride_wr,
    stride_ws,
    first_h,
    first_w,
    apart_h,
    apart_w,
    part,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Write what is made of G, of ``part`` boxes' places, for BLOCK_M outputs and BLOCK_N inputs of a tap."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    o = tl.program_id(0) % tl.cdiv(F, BLOCK_M) * BLOCK_M
    i_c, i_part = tl.program_id(0) // tl.cdiv(F, BLOCK_M), tl.program_id(1)
    c, tap = i_c // TAPS * BLOCK_N, i_c % TAPS
    r, s = tap // KERNEL_W, tap % KERNEL_W

    b_g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    image, p, q = first_place(i_part * part, P, Q, BOX_N, BOX_H, BOX_W)
    for _ in range(part):
        b_dy = tl.reshape(dy_ptr.load([image, p, q, o]), [PLACES, BLOCK_M])
        h, w = p + first_h + r * apart_h, q + first_w + s * apart_w
        b_x = tl.reshape(x_ptr.load([image, h, w, c]), [PLACES, BLOCK_N])
        b_g = dot(tl.trans(b_dy), b_x, b_g, "tf32")
        # To the next box; divisions were half of the loop's instructions.
        q += BOX_W
        p, q = tl.where(q < Q, p, p + BOX_H), tl.where(q < Q, q, 0)
        image, p = tl.where(p < P, image, image + BOX_N), tl.where(p < P, p, 0)

    o_o, o_c = o + tl.arange(0, BLOCK_M), c + tl.arange(0, BLOCK_N)
    index = o_o[:, None] * (C * TAPS) + (o_c * TAPS + tap)[None, :]
    o_w = o_o[:, None] * stride_wo + (o_c * stride_wc + (r * stride_wr + s * stride_ws))[None, :]
    write_tile(
        b_g,
        index,
        o_w,
        (o_o < F)[:, None] & (o_c < C)[None, :],
        i_part.to(tl.int64) * (F * C * TAPS),
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


PRODUCT_CONFIGS = [
    Config({"BLOCK_M": 128, "PLACES": 128, "BLOCK_K": 64}, 8, 3),
    Config({"BLOCK_M": 128, "PLACES": 256, "BLOCK_K": 64}, 8, 4),
    Config({"BLOCK_M": 64, "PLACES": 128, "BLOCK_K": 64}, 4, 3),
    Config({"BLOCK_M": 64, "PLACES": 256, "BLOCK_K": 64}, 4, 2),
]
GRADS_CONFIGS = [
    Config({"BLOCK_M": 128, "BLOCK_N": 128, "PLACES": 64}, 8, 3),
    Config({"BLOCK_M": 64, "BLOCK_N": 128, "PLACES": 64}, 4, 4),
    Config({"BLOCK_M": 64, "BLOCK_N": 64, "PLACES": 64}, 4, 4),
]


@triton.jit
def first_place(i_box, height, width, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr):
    """Return image, row and column where a box begins; boxes are counted along rows, then images."""
    across, down = tl.cdiv(width, BOX_W), tl.cdiv(height, BOX_H)
    return i_box // (across * down) * BOX_N, i_box // across % down * BOX_H, i_box % across * BOX_W


@triton.jit
def words_end(channels):
    """Return how many bits the words of a tap have."""
    return tl.cdiv(channels, 32) * 32


def is_boxed(config: Config) -> bool:
    """Tell whether a configuration is one of these kernels'."""
    return "PLACES" in config.values


def is_large(config: Config) -> bool:
    """Tell whether what is written of a tile, G twice over, does not fit in registers beside it."""
    return config.values["BLOCK_M"] * config.values["BLOCK_N"] >= 128 * 128


def boxable(x: Tensor, weight: Tensor, geometry: Geometry, *described: Tensor) -> bool:
    """Tell whether these kernels serve a convolution of images like ``x``, of which they describe some
    tensors."""
    stride, padding, _, groups = geometry
    if groups > 1 or not has_copy_engine(x.device):
        return False
    if math.prod(stride) > 1:
        single = weight.shape[2] == weight.shape[3] == 1 and not any(padding)
        # Each stride of a described tensor is a multiple of the one before.
        if not single or any(size % step for size, step in zip(x.shape[2:], stride, strict=True)):
            return False
    return all(
        t.element_size() == 2
        and t.numel() > 0
        and t.is_contiguous(memory_format=torch.channels_last)
        and has_whole_rows(_flat(t))
        for t in described
    )


@functools.lru_cache(maxsize=1024)
def box_of(
    num_images: int, height: int, width: int, places: int, whole: bool = False
) -> tuple[int, int, int]:
    """Return images, rows and columns of the boxes of so many places that are fewest; of these the widest.

    Args:
        num_images: counts as the next power of two, for a kernel is compiled for a box.
        whole: whether all rows and columns must be places. Others are zeros of a gradient, but what such a
            window sees may be infinite.
    """
    powers = [2**i for i in range(places.bit_length())]
    boxes = [
        (places // (h * w), h, w)
        for h, w in product(powers, powers)
        if h * w <= places and not (whole and (height % h or width % w))
    ]
    size = 1 << max(num_images - 1, 0).bit_length(), height, width
    return min(boxes, key=lambda box: (num_boxes(size, box), -box[2], -box[1]))


def num_boxes(size: Sequence[int], box: Sequence[int]) -> int:
    """Return how many boxes cover images, rows and columns."""
    return math.prod(-(-count // side) for count, side in zip(size, box, strict=True))


def boxed_conv_(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    transposed: bool,
    config: Config,
) -> None:
    """Write the convolution of ``x`` to ``y``; or, ``transposed``, the input's gradient for the output's.

    Args:
        words: of [outputs, taps, channels], each tap's starting on a word.
    """
    block = config.values
    num_m, num_k = block["BLOCK_M"], block["BLOCK_K"]
    source, target = _planes(x), _planes(y)
    if not transposed:
        source = _seen(source, geometry)
    elif math.prod(geometry[0]) > 1:
        y.zero_()
        target = _seen(target, geometry)
    size = target.shape[:3]
    box = box_of(*size, block["PLACES"])
    outputs, inputs, *kernel_size = weight.shape
    boxed_conv_kernel[(num_boxes(size, box) * triton.cdiv(y.shape[1], num_m),)](
        describe(source, *box, num_k),
        describe(_flat(weight).view(outputs, -1), *((num_k, num_m) if transposed else (num_m, num_k))),
        words,
        bias,
        describe(target, *box, num_m),
        *size[1:],
        inputs,
        outputs,
        *_taps(geometry, -1 if transposed else 1),
        **_kernel_and_box(kernel_size, box),
        TRANSPOSED=transposed,
        HAS_BIAS=bias is not None,
        **config.options,
    )


def boxed_conv_grads_(
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
    block = config.values
    size = grad.shape[0], *grad.shape[2:]
    box = box_of(*size, block["PLACES"], whole=True)
    outputs, inputs, *kernel_size = weight.shape
    tiles = num_tiles(outputs, inputs, config) * math.prod(kernel_size)
    num_parts, part = split_sum(num_boxes(size, box), weight.numel(), tiles, 1)
    parts = new_parts(num_parts, weight) if num_parts > 1 else None
    boxed_conv_grads_kernel[(tiles, num_parts)](
        describe(_planes(grad), *box, block["BLOCK_M"]),
        describe(_seen(_planes(x), geometry), *box, block["BLOCK_N"]),
        weight,
        words,
        dscores,
        dweight,
        parts,
        *grad.shape[2:],
        inputs,
        outputs,
        *weight.stride(),
        *_taps(geometry, 1),
        part,
        **_kernel_and_box(kernel_size, box),
        HAS_SCORES=dscores is not None,
        HAS_WEIGHT=dweight is not None,
        HAS_PARTS=parts is not None,
        ACCUMULATE=accumulate,
        **config.options,
    )
    if parts is not None:
        sum_parts_(parts, weight, words, dscores, dweight, accumulate)


def variants() -> Iterator[Variant]:
    """Yield every kernel under every configuration, as launches of a 3 x 3 window would compile it."""
    for transposed, config in product((False, True), PRODUCT_CONFIGS):
        block, box = config.values, _example_box(config)
        rows, columns = ("BLOCK_K", "BLOCK_M") if transposed else ("BLOCK_M", "BLOCK_K")
        tiles = {
            "x_ptr": (*box, block["BLOCK_K"]),
            "w_ptr": (block[rows], block[columns]),
            "y_ptr": (*box, block["BLOCK_M"]),
        }
        constants = {"TRANSPOSED": transposed, "HAS_BIAS": not transposed}
        yield _variant(f"boxed_conv{' transposed' * transposed}", boxed_conv_kernel, tiles, constants, config)
    for config in GRADS_CONFIGS:
        block, box = config.values, _example_box(config)
        tiles = {"dy_ptr": (*box, block["BLOCK_M"]), "x_ptr": (*box, block["BLOCK_N"])}
        constants = {"HAS_SCORES": True, "HAS_PARTS": False, "ACCUMULATE": True}
        for weight in (False,) if is_large(config) else (False, True):
            name = f"boxed_conv_grads{', and of the weight' * weight}"
            of_both = constants | {"HAS_WEIGHT": weight}
            yield _variant(name, boxed_conv_grads_kernel, tiles, of_both, config)


def _variant(
    name: str, kernel: Any, tiles: dict[str, tuple[int, ...]], constants: dict[str, Any], config: Config
) -> Variant:
    """Return a variant whose weight is dense."""
    constants = constants | _kernel_and_box((3, 3), _example_box(config))
    if kernel is boxed_conv_grads_kernel:
        constants["stride_wc"] = 1
    types = {"words_ptr": "*i32", "dscores_ptr": "*fp32", "parts_ptr": "*fp32"}
    types |= {pointer: f"tensordesc<bf16{list(tile)}>" for pointer, tile in tiles.items()}
    types |= dict.fromkeys(constants | config.values, "constexpr")
    names = kernel.arg_names
    signature = {name: types.get(name, "*bf16" if name.endswith("_ptr") else "i32") for name in names}
    aligned = tuple(
        n for n in names if signature[n].startswith("*") or n in ("C", "F") or n.startswith("stride_w")
    )
    sizes = "x".join(map(str, config.values.values()))
    return Variant(
        f"{name}, {sizes}, {config.num_warps} warps, {config.num_stages} stages",
        kernel,
        signature,
        constants,
        config,
        tuple(n for n in aligned if signature[n] != "constexpr"),
        minimum_architecture=90,
    )


def _example_box(config: Config) -> tuple[int, int, int]:
    return config.values["PLACES"] // 64, 8, 8


def _taps(geometry: Geometry, sign: int) -> tuple[int, ...]:
    """Return how far from its place a window begins, and how far apart its taps are, in rows and columns."""
    _, padding, dilation, _ = geometry
    return (*(-sign * p for p in padding), *(sign * d for d in dilation))


def _kernel_and_box(kernel_size: Sequence[int], box: Sequence[int]) -> dict[str, int]:
    names = "KERNEL_H", "KERNEL_W", "BOX_N", "BOX_H", "BOX_W"
    return dict(zip(names, (*kernel_size, *box), strict=True))


def _planes(images: Tensor) -> Tensor:  # [N, C, H, W] -> [N, H, W, C], with the strides of its sizes
    return _flat(images).view(images.shape[0], *images.shape[2:], images.shape[1])


def _seen(planes: Tensor, geometry: Geometry) -> Tensor:
    """Return the places that windows of one place see."""
    stride = geometry[0]
    return planes[:, :: stride[0], :: stride[1]]


def _flat(images: Tensor) -> Tensor:  # [N, C, H, W] -> [N * H * W, C]
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])
