"""``pack_mask`` and ``unpack_mask``: the masks of all layers, to bits and back."""

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.checks import require_same
from benchmarks.harness import contest
from benchmarks.searches import Search
from jackpot_kernels import reference
from jackpot_kernels.ops.pack_mask import pack_mask, unpack_mask


def bench_pack_mask(benchmark: BenchmarkFixture, search: Search, budget_s: float) -> None:
    """Against the reference, and against ``np.packbits``, which uses one thread and makes bytes."""
    masks = [layer.mask for layer in search.layers]
    arrays = [mask.numpy().reshape(-1) for mask in masks]

    def pack() -> list[Tensor]:
        return [pack_mask(mask) for mask in masks]

    def eager() -> list[Tensor]:
        return [reference.pack_mask(mask) for mask in masks]

    def packbits() -> list[np.ndarray]:
        return [np.packbits(array, bitorder="little") for array in arrays]

    expected = eager()
    require_same("words", pack(), expected)
    for words, packed in zip(expected, packbits(), strict=True):
        if words.numpy().tobytes()[: packed.size] != packed.tobytes():
            raise AssertionError("np.packbits must make the bytes of the reference's words, got others")
    contest(benchmark, pack, {"eager": eager, "np.packbits": packbits}, budget_s=budget_s)


def bench_unpack_mask(benchmark: BenchmarkFixture, search: Search, budget_s: float) -> None:
    """Against the reference, and against ``np.unpackbits``, which uses one thread."""
    layers = [(layer.mask_words, layer.weight.shape) for layer in search.layers]

    def unpack() -> list[Tensor]:
        return [unpack_mask(words, shape) for words, shape in layers]

    def eager() -> list[Tensor]:
        return [reference.unpack_mask(words, shape) for words, shape in layers]

    def unpackbits() -> list[np.ndarray]:
        return [
            np.unpackbits(words.numpy().view(np.uint8), count=shape.numel(), bitorder="little")
            for words, shape in layers
        ]

    expected = eager()
    require_same("mask", unpack(), expected)
    for mask, unpacked in zip(expected, unpackbits(), strict=True):
        if not np.array_equal(mask.numpy().reshape(-1), unpacked):
            raise AssertionError("np.unpackbits must make the reference's mask, got another")
    contest(benchmark, unpack, {"eager": eager, "np.unpackbits": unpackbits}, budget_s=budget_s)
