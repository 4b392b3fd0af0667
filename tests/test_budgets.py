"""Budgets: totals are exact, no layer is empty, and every way of sharing agrees with a slow count."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jackpot_kernels import budgets

SHAPES = {
    "stem": (16, 3, 3, 3),
    "a": (16, 16, 3, 3),
    "b": (32, 16, 1, 1),
    "depthwise": (16, 1, 3, 3),
    "fc": (10, 32),
}


@pytest.mark.parametrize("joint", [False, True])
def test_masks_keep_as_many_where_torch_flushes_subnormal_numbers(joint):
    values = [torch.randint(0, 2**20, (n,), dtype=torch.int32).view(torch.float32) for n in (900, 300)]
    torch.set_flush_denormal(True)
    try:
        masks = budgets.kept_masks(values, [120] if joint else [90, 30], joint)
    finally:
        torch.set_flush_denormal(False)
    kept = [int(mask.sum()) for mask in masks]
    assert sum(kept) == 120 if joint else kept == [90, 30]


def importance(shapes=SHAPES, seed=0, levels=None):
    rng = np.random.default_rng(seed)
    draw = (lambda s: rng.integers(levels, size=s)) if levels else (lambda s: rng.random(s))
    return {name: torch.tensor(draw(shape), dtype=torch.float32) for name, shape in shapes.items()}


def brute_force_global(tensors, num_kept):
    """Counts of the first `num_kept` by (value, layer, index), with every layer's best taken beforehand."""
    ranked = sorted(
        (-float(v), layer, i) for layer, t in enumerate(tensors.values()) for i, v in enumerate(t.flatten())
    )
    best = {min(r for r in ranked if r[1] == layer) for layer in range(len(tensors))}
    rest = [r for r in ranked if r not in best][: max(num_kept - len(best), 0)]
    return [sum(r[1] == layer for r in [*best, *rest]) for layer in range(len(tensors))]


def brute_force_shares(total, shares, caps):
    """Water filling by bisection on the scale in exact fractions, then the largest remainders."""
    low, high = Fraction(0), Fraction(max(caps))
    parts = lambda scale: [min(max(scale * s, 1), c) for s, c in zip(shares, caps, strict=True)]  # noqa: E731
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(parts(middle)) < total else (low, middle)
    return [float(p) for p in parts(high)]


@pytest.mark.parametrize(
    ("sparsity", "numel", "expected"),
    [
        (0.9, 100, 90),
        (0.9, 10, 9),
        (0.1, 10, 1),
        (0.7, 10, 7),
        (0.95, 20, 19),
        (0.29, 100, 29),
        (0.9, 1, 1),
        (0, 5, 0),
        (0.57, 100, 57),
        (1e-300, 7, 1),
        (0.999999, 10, 10),
        (Fraction(9, 10), 100, 90),
        (np.float32(0.9), 100, 90),
        (np.float64(0.9), 1000, 900),
        (0.9, 25_502_912, 22_952_621),
    ],
)
def test_num_pruned_takes_the_fraction_as_written(sparsity, numel, expected):
    assert budgets.num_pruned(sparsity, numel) == expected


@given(st.integers(0, 999), st.integers(0, 10**9))
def test_num_pruned_is_the_exact_ceiling(thousandths, numel):
    assert budgets.num_pruned(thousandths / 1000, numel) == -(-thousandths * numel // 1000)


@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_num_pruned_refuses_what_is_no_sparsity(sparsity):
    with pytest.raises(ValueError, match=r"^sparsity must be in \[0, 1\), got "):
        budgets.num_pruned(sparsity, 10)


@pytest.mark.parametrize("sparsity", ["0.9", None, True, 1j])
def test_num_pruned_refuses_what_is_no_number(sparsity):
    with pytest.raises(TypeError, match=r"^sparsity must be a number, got "):
        budgets.num_pruned(sparsity, 10)


@pytest.mark.parametrize("levels", [None, 1, 2, 5])
@pytest.mark.parametrize("joint", [False, True])
def test_kept_masks_break_ties_by_lowest_index(levels, joint):
    tensors = list(importance(levels=levels).values())
    sizes = [t.numel() for t in tensors]
    num_kept = [sum(sizes) // 3] if joint else [1 + size // 3 for size in sizes]
    masks = budgets.kept_masks(tensors, num_kept, joint)
    segments = (
        [np.concatenate([t.numpy().ravel() for t in tensors])]
        if joint
        else [t.numpy().ravel() for t in tensors]
    )
    expected = []
    for values, k in zip(segments, num_kept, strict=True):
        mask = np.zeros(values.size, bool)
        mask[np.argsort(-values, kind="stable")[:k]] = True
        expected.append(mask)
    np.testing.assert_array_equal(
        np.concatenate([m.numpy().ravel() for m in masks]), np.concatenate(expected)
    )
    assert [m.shape for m in masks] == [t.shape for t in tensors]


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.9, 0.95, 0.98])
@pytest.mark.parametrize("levels", [None, 3])
def test_global_is_one_selection_over_all_layers(sparsity, levels):
    tensors = importance(levels=levels)
    total = sum(t.numel() for t in tensors.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = budgets.global_(tensors, sparsity)
    num_kept = total - budgets.num_pruned(sparsity, total)
    assert list(counts.values()) == brute_force_global(tensors, num_kept)
    assert sum(counts.values()) == num_kept


def test_global_gives_an_empty_layer_its_best_and_takes_it_from_the_others():
    tensors = {"high": torch.arange(1.0, 91.0), "low": torch.full((10,), 0.5)}
    with pytest.warns(UserWarning, match="no weight in 'low'; each keeps its best"):
        assert budgets.global_(tensors, 0.9) == {"high": 9, "low": 1}


@pytest.mark.parametrize("budget", list(budgets.BUDGETS.values()))
def test_a_budget_below_one_weight_a_layer_keeps_one_in_each(budget):
    tensors = {"a": torch.ones(5, 1), "b": torch.ones(4, 1), "c": torch.ones(3, 1)}
    with pytest.warns(UserWarning, match="'a', 'b', 'c'"):
        assert budget(tensors, 0.99) == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("budget", list(budgets.BUDGETS.values()))
def test_sparsity_zero_keeps_everything_and_importance_is_not_changed(budget):
    tensors = importance()
    before = {name: t.clone() for name, t in tensors.items()}
    assert budget(tensors, 0.0) == {name: t.numel() for name, t in tensors.items()}
    assert all(torch.equal(before[name], t) for name, t in tensors.items())


def test_uniform_prunes_each_layer_alike():
    counts = budgets.uniform(importance(), 0.9)
    assert counts == {n: math.prod(s) - math.ceil(Fraction(9, 10) * math.prod(s)) for n, s in SHAPES.items()}


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.9, 0.95])
def test_erk_density_is_in_proportion_to_dimension_sum_over_product(sparsity):
    counts = budgets.erk(importance(), sparsity)
    numel = sum(math.prod(s) for s in SHAPES.values())
    total = numel - math.ceil(Fraction(str(sparsity)) * numel)
    assert sum(counts.values()) == total
    # As published: whole layers leave the pool until no density passes 1.
    whole = set()
    while True:
        pool = {n: s for n, s in SHAPES.items() if n not in whole}
        scale = (total - sum(math.prod(SHAPES[n]) for n in whole)) / sum(sum(s) for s in pool.values())
        over = {n for n, s in pool.items() if scale * sum(s) > math.prod(s)}
        if not over:
            break
        whole |= over
    assert all(counts[n] == math.prod(SHAPES[n]) for n in whole)
    assert all(abs(counts[n] - scale * sum(s)) < 1 for n, s in pool.items())


def test_dict_is_checked_name_by_name():
    tensors = {"a": torch.ones(4), "b": torch.ones(6)}
    assert budgets.given(tensors, {"b": 6, "a": np.int64(1)}) == {"a": 1, "b": 6}
    for wrong, message in [
        ({"a": 1, "b": 1, "c": 1}, "budget must name masked layers, got 'c'"),
        ({"a": 1}, "budget must name every masked layer, got none for 'b'"),
        ({"a": 0, "b": 1}, r"budget of 'a' must be in \[1, 4\], got 0"),
        ({"a": 1, "b": 7}, r"budget of 'b' must be in \[1, 6\], got 7"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}$"):
            budgets.given(tensors, wrong)
    for wrong in (1.0, "1", True, None):
        with pytest.raises(TypeError, match=r"^budget of 'a' must be an integer, got "):
            budgets.given(tensors, {"a": wrong, "b": 1})


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=12), st.data())
def test_scale_budget_is_proportional_exact_and_never_rises(counts, data):
    total = data.draw(st.integers(len(counts), sum(counts)))
    scaled = list(budgets.scale_budget({str(i): c for i, c in enumerate(counts)}, total).values())
    assert sum(scaled) == total
    assert all(1 <= new <= old for new, old in zip(scaled, counts, strict=True))
    expected = brute_force_shares(total, counts, counts)
    assert all(abs(new - part) < 1 + 1e-6 for new, part in zip(scaled, expected, strict=True))


def test_scale_budget_gives_odd_weights_by_largest_remainder_then_order():
    assert budgets.scale_budget({"a": 10, "b": 10, "c": 10}, 20) == {"a": 7, "b": 7, "c": 6}
    assert budgets.scale_budget({"a": 3, "b": 97}, 50) == {"a": 2, "b": 48}
    assert budgets.scale_budget({"a": 1, "b": 1000}, 10) == {"a": 1, "b": 9}


@pytest.mark.parametrize("total", [2, 31, -1])
def test_scale_budget_refuses_totals_out_of_range(total):
    with pytest.raises(ValueError, match=rf"^target_total must be in \[3, 30\], got {total}$"):
        budgets.scale_budget({"a": 10, "b": 10, "c": 10}, total)


def test_scale_budget_is_quick_for_many_layers():
    shares = {str(i): 1 + (i * 7919) % 100_003 for i in range(300)}
    assert sum(budgets.scale_budget(shares, sum(shares.values()) // 7).values()) == sum(shares.values()) // 7
