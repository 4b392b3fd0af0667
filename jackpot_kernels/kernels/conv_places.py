"""What the kernels of a convolution share: how they count places of images, and what a launch tells them."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from jackpot_kernels.kernels.tuning import HOPPER, Config, Variant

# Stride, padding and dilation, each of rows and columns, and groups.
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]

# What makes no better code where it is 1 or a multiple of 16: so a network needs fewer kernels compiled.
UNSPECIALIZED = ["N", "H", "W", "P", "Q", "pad_h", "pad_w", "part"]


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


def is_scattered(channels: tuple[int, ...], *tensors: Tensor) -> bool:
    """Tell whether the kernel cannot copy 16 bytes of channels at a time."""
    return any(count % 16 for count in channels) or any(
        t.stride(1) != 1 or t.data_ptr() % 16 != 0 or any(s % 16 for s in (t.stride(0), *t.stride()[2:]))
        for t in tensors
    )


def num_tiles(rows: int, columns: int, config: Config) -> int:
    """Return how many blocks of BLOCK_M rows and BLOCK_N columns there are."""
    return int(triton.cdiv(rows, config.values["BLOCK_M"]) * triton.cdiv(columns, config.values["BLOCK_N"]))


def sizes(x: Tensor, y: Tensor) -> tuple[int, ...]:
    """Return the number of images, and the sizes of an image before and after the convolution."""
    return x.shape[0], *x.shape[2:], *y.shape[2:]


def window(geometry: Geometry) -> tuple[int, ...]:
    """Return how a window moves, as kernels take it: steps, padding and dilation."""
    stride, padding, dilation, _ = geometry
    return (*stride, *padding, *dilation)


def kernel_size(weight: Tensor) -> dict[str, int]:
    """Return the constants of a window's size."""
    return {"KERNEL_H": weight.shape[2], "KERNEL_W": weight.shape[3]}


# Whether the channels of a layout are scattered, at least for the kernels.
LAYOUTS = {"channels_last": False, "scattered": True, "few channels": True}


def variant(
    kernel: Any,
    kind: str,
    layout: str,
    constants: dict[str, Any],
    config: Config,
    hopper: bool = False,
    described: str = "",
) -> Variant:
    """Return a variant whose steps are 1, and whose channels, or else columns, are next to each other.

    Args:
        kind: "half", "tf32" or "ieee".
        layout: a key of ``LAYOUTS``.
        constants: besides those of the window and of ``config``.
        described: the pointer that is a descriptor, if one is.
    """
    names, scattered = kernel.arg_names, LAYOUTS[layout]
    dense = ("xw", "ws", "yq") if scattered else ("xc", "wc", "yo")
    ones = ["step_h", "step_w", "dilation_h", "dilation_w", *(f"stride_{dimension}" for dimension in dense)]
    constants = constants | {"KERNEL_H": 3, "KERNEL_W": 3} | {name: 1 for name in ones if name in names}
    types = {"words_ptr": "*i32", "dscores_ptr": "*fp32", "parts_ptr": "*fp32"}
    types |= dict.fromkeys(constants | config.values, "constexpr")
    element = "bf16" if kind == "half" else "fp32"
    signature = {name: types.get(name, f"*{element}" if name.endswith("_ptr") else "i32") for name in names}
    block = config.values
    if described:
        signature[described] = f"tensordesc<{element}[{block['BLOCK_N']}, {block['BLOCK_M']}]>"
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
