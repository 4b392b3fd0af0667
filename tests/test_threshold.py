"""Thresholds, exactly, against a sort in NumPy."""

from collections.abc import Callable

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jackpot_kernels import reference, threshold

KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy tails": lambda rng, n: rng.standard_cauchy(n),
    "few values": lambda rng, n: rng.integers(-2, 3, n) / 4,
    "two values": lambda rng, n: np.where(rng.random(n) < 0.1, 1.0, 0.99),
    "all equal": lambda rng, n: np.full(n, 0.99),
    "signed zeros": lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, -0.0),
    "infinities": lambda rng, n: rng.choice([-np.inf, 0.5, np.inf], n),
    "NaN": lambda rng, n: np.where(rng.random(n) < 0.3, np.nan, rng.standard_normal(n)),
    "adjacent": lambda rng, n: 1 + rng.integers(0, 9, n) * 2.0**-23,
    "sorted": lambda rng, n: np.sort(rng.standard_normal(n)),
}


def check(values: list[np.ndarray], num_kept: list[int], joint: bool) -> None:
    tensors = [torch.from_numpy(v) for v in values]
    value, index = threshold(tensors, torch.tensor(num_kept), joint)
    segments = [np.concatenate(values)] if joint else values
    for i, (segment, kept) in enumerate(zip(segments, num_kept, strict=True)):
        wanted, position = oracle.threshold(segment, kept)
        assert int(index[i]) == position
        assert np.float32(wanted).tobytes() == value[i].numpy().tobytes()


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    kind=st.sampled_from(sorted(KINDS)),
    joint=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_a_sort(sizes: list[int], kind: str, joint: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [KINDS[kind](rng, n).astype(np.float32) for n in sizes]
    counts = [sum(sizes)] if joint else sizes
    check(values, [int(rng.integers(1, n + 1)) for n in counts], joint)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 1.0])
def test_layers_of_many_tiles(kind: str, share: float) -> None:
    rng = np.random.default_rng(0)
    values = [KINDS[kind](rng, n).astype(np.float32) for n in (300_007, 4096, 4097)]
    check(values, [max(1, int(share * v.size)) for v in values], joint=False)
    check(values, [int(share * sum(v.size for v in values))], joint=True)


@pytest.mark.parametrize("n", [2100, 36_864])
def test_many_ties_below_a_few_that_a_sample_misses(n: int) -> None:
    """The range of the k-th then reaches up to any value, and its rounded middle below its lower end."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values = np.full(n, 0.5)
        values[: n // 2 + 30] = 1.5
        values[rng.choice(n, 3, replace=False)] = rng.choice([1.6, 7.0, 1e9, 3e38], 3)
        check([values.astype(np.float32)], [int(rng.choice([1, 2, 3, 4, 100]))], joint=False)


@pytest.mark.parametrize("n", [3000, 20_000])
def test_the_kth_just_below_many_zeros(n: int) -> None:
    """The range of the k-th then ends below -0, too, which equals +0."""
    rng = np.random.default_rng(0)
    values = np.where(rng.random(n) < 0.3, 0.0, rng.standard_normal(n)).astype(np.float32)
    values *= rng.choice([-1, 1], n).astype(np.float32)
    num_kept = [int((values >= 0).sum()) + below for below in (0, 1, 2, 10, 30, 100)]
    check([values] * len(num_kept), num_kept, joint=False)


def test_subnormal_numbers_count_where_torch_flushes_them() -> None:
    """Equal as numbers, different by their bits: no k-th was found, and memory of nobody was read."""
    bits = np.random.default_rng(0).integers(0, 2**20, 20_000).astype(np.int32)
    values, kept = torch.from_numpy(bits).view(torch.float32), torch.tensor([100])
    wanted = oracle.threshold(values.numpy(), 100)[1]
    torch.set_flush_denormal(True)
    try:
        index = threshold([values], kept)[1]
    finally:
        torch.set_flush_denormal(False)
    assert int(index) == wanted


def test_reference_agrees() -> None:
    values = [torch.randint(0, 50, (n,)).float() for n in (1, 77, 5000)]
    kept = torch.tensor([1, 7, 500])
    assert all(map(torch.equal, threshold(values, kept), reference.threshold(values, kept)))


def test_has_no_derivative() -> None:
    value, index = threshold([torch.randn(5, requires_grad=True)], torch.tensor([2]))
    assert not value.requires_grad
    assert not index.requires_grad


def test_refuses_what_does_not_fit() -> None:
    values = [torch.ones(3), torch.ones(4)]
    with pytest.raises(ValueError, match=r"num_kept must be in \[1, 4\], got 5"):
        threshold(values, torch.tensor([1, 5]))
    with pytest.raises(ValueError, match=r"num_kept must be in \[1, 7\], got 0"):
        threshold(values, torch.tensor([0]), joint=True)
    with pytest.raises(ValueError, match=r"num_kept must have shape \[2\], got \[1\]"):
        threshold(values, torch.tensor([1]))
    with pytest.raises(TypeError, match="values must be float32, got float64"):
        threshold([torch.ones(3).double()], torch.tensor([1]))
    with pytest.raises(ValueError, match=r"num_kept must have shape \[2\], got \[2, 1\]"):
        threshold(values, torch.tensor([[1], [1]]))
    with pytest.raises(TypeError, match="num_kept must be int64, got float32"):
        threshold(values, torch.ones(2))
    with pytest.raises(TypeError, match="num_kept must be a tensor, got list"):
        threshold(values, [1, 1])
    with pytest.raises(TypeError, match="values must be a tensor, got float"):
        threshold([torch.ones(3), 1.0], torch.tensor([1, 1]))
    for values in (torch.ones(2, 3), None):
        with pytest.raises(TypeError, match=r"^values must be a list of tensors, got (Tensor|NoneType)$"):
            threshold(values, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="at least one tensor"):
        threshold([], torch.tensor([]))


def test_refuses_the_meta_device_for_some_tensors_only() -> None:
    """Torch runs the fake of an operator then, which left memory of nobody to be read."""
    values, kept = [torch.ones(3), torch.ones(4)], torch.tensor([1, 2])
    on_meta = [value.to("meta") for value in values]
    with pytest.raises(ValueError, match=r"^num_kept must be on meta, got cpu$"):
        threshold(on_meta, kept)
    with pytest.raises(ValueError, match=r"^num_kept must be on cpu, got meta$"):
        threshold(values, kept.to("meta"))
    with pytest.raises(ValueError, match=r"^values must be on cpu, got meta$"):
        threshold([values[0], on_meta[1]], kept)
    value, index = threshold(on_meta, kept.to("meta"))
    assert value.is_meta and index.is_meta and value.shape == index.shape == kept.shape


def test_strides_do_not_matter() -> None:
    values = [torch.randn(40, 30).t(), torch.randn(7, 2)[:, 0]]
    kept = torch.tensor([[100, 0], [3, 0]])[:, 0]
    wanted = threshold([value.contiguous() for value in values], kept.contiguous())
    assert all(map(torch.equal, threshold(values, kept), wanted))


def test_operator_passes_opcheck() -> None:
    values = [torch.randn(5), torch.randn(40)]
    torch.library.opcheck(torch.ops.jackpot.threshold, (values, torch.tensor([2, 3]), False))
