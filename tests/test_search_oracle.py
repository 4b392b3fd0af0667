"""SRPopup against the independent oracle: the same bits of scores, momentum and masks after every step."""

import math
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import jackpot_kernels as jk
from jackpot_kernels.search.schedule import ramp_table, rate_table

SCHEDULES = ("quartic", "inverse", "constant", "single", lambda u: 0.5 * u)
SHAPES = [
    (1, 1),
    (1, 3),
    (2, 5),
    (8, 4),
    (3, 11),
    (9, 7),
    (3, 2, 5),
    (4, 3, 3, 3),
    (5, 2, 1, 1),
    (2, 3, 2, 2, 2),
]
CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Layers of a few weights gain nothing from threads, and wait long for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def threads(request):
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


def make_layer(shape, channels_last):
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0])
    layer = CONVOLUTIONS[len(shape)](shape[1], shape[0], shape[2:])
    return layer.to(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else layer


def make_model(shapes, channels_last=False):
    return jk.convert(nn.Sequential(*(make_layer(shape, channels_last) for shape in shapes)))


def make_scores(rng, size, style, eta=0.99):
    if style == "random":
        return rng.standard_normal(size).astype(np.float32)
    values = {"equal": [1.0], "two": [1.0, eta], "ties": [-1.0, -0.0, 0.0, 0.5, 1.0]}[style]
    return rng.choice(np.array(values, np.float32), size)


def make_grad(rng, size, style):
    """None, or a gradient in numpy: "ties" and "zero" keep equal scores equal, "huge" tears them apart."""
    if style == "none":
        return None
    grad = {
        "random": lambda: rng.standard_normal(size),
        "ties": lambda: rng.integers(-1, 2, size),
        "zero": lambda: np.zeros(size),
        "huge": lambda: rng.standard_normal(size) * 1e15,
    }[style]()
    return grad.astype(np.float32)


def bits(array):
    return np.ascontiguousarray(array, np.float32).view(np.int32)


def numpy_of(tensor):
    return tensor.detach().reshape(-1).numpy().copy()


def assert_same(optimizer, model, search, swaps):
    """Everything the optimizer holds equals what the oracle holds, to the bit."""
    assert (optimizer.steps, optimizer.skipped_steps) == (search.steps, search.skipped)
    layers = jk.masked_layers(model).values()
    for layer, scores, momentum, mask in zip(
        layers, search.scores, search.momenta, search.masks, strict=True
    ):
        np.testing.assert_array_equal(bits(numpy_of(layer.scores)), bits(scores))
        buffer = optimizer.state[layer.scores]["momentum_buffer"]
        np.testing.assert_array_equal(bits(numpy_of(buffer)), bits(momentum))
        np.testing.assert_array_equal(numpy_of(layer.mask), mask)
        cached = layer.cached_effective_weight
        assert cached is None or torch.equal(cached, (layer.weight * layer.mask).to(cached.dtype))
    if swaps:
        rows = [(s.proposed, s.entered, s.proposed - s.entered, s.threshold) for s in swaps]
        assert [tuple(row) for row in optimizer.stats().values()] == rows


def assert_kept(search):
    kept = [int(mask.sum()) for mask in search.masks]
    assert ([sum(kept)] if search.joint else kept) == search.num_kept()


def assert_top_k(search):
    """At rate 1 the mask is the first K of the scores."""
    scores = [np.concatenate(search.scores)] if search.joint else search.scores
    masks = [np.concatenate(search.masks)] if search.joint else search.masks
    for s, mask, k in zip(scores, masks, search.num_kept(), strict=True):
        assert set(np.flatnonzero(mask)) == set(oracle.ranking(s)[:k])


def fill_caches(model):
    """Run each layer once, so that it holds an effective weight for the optimizer to patch."""
    for layer in model:
        with torch.no_grad():
            layer(torch.zeros(1, layer.weight.shape[1], *layer.weight.shape[2:]))


@st.composite
def searches(draw):
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    sizes = [math.prod(shape) for shape in shapes]
    kept = [draw(st.integers(1, size)) for size in sizes]
    hyper = st.fixed_dictionaries(
        {
            "lr": st.sampled_from([0.0, 0.1, 0.37]),
            "momentum": st.sampled_from([0.9, 0.0, 0.5]),
            "weight_decay": st.sampled_from([5e-4, 0.0, 0.1]),
            "nesterov": st.booleans(),
            "step_scale": st.sampled_from([1.0, 0.25, 3.0]),
        }
    )
    return {
        "shapes": shapes,
        "kept": kept,
        "final": [draw(st.integers(1, k)) for k in kept] if draw(st.booleans()) else kept,
        "start": draw(st.sampled_from(["initial", "random", "equal", "two", "ties"])),
        "channels_last": draw(st.booleans()),
        "cached": draw(st.booleans()),
        "hyper": [draw(hyper) for _ in shapes],
        "total_steps": draw(st.integers(1, 12)),
        "scope": draw(st.sampled_from(["layer", "global"])),
        "schedule": draw(st.sampled_from(SCHEDULES)),
        "pairs": draw(st.sampled_from(["best", "inverse", "random"])),
        "ramp": draw(st.sampled_from(["cubic", "linear"])),
        "ramp_end": draw(st.sampled_from([0.3, 0.5, 1.0])),
        "swap_every": draw(st.sampled_from([1, 1, 2, 5])),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "grads": draw(
            st.lists(st.sampled_from(["random", "ties", "zero", "none", "huge"]), min_size=1, max_size=5)
        ),
        "bad_step": draw(st.integers(0, 12)),
        "scale": draw(st.sampled_from([None, 1.0, 1024.0, 3.0])),
        "data": draw(st.integers(0, 2**32 - 1)),
    }


def start_both(case, rng):
    """The same start twice: a model with its optimizer, and the oracle."""
    model = make_model(case["shapes"], case["channels_last"])
    layers = list(jk.masked_layers(model).items())
    groups, masks, scores = [], [], []
    for (_, layer), kept, hyper in zip(layers, case["kept"], case["hyper"], strict=True):
        size = layer.weight.numel()
        mask = np.zeros(size, bool)
        mask[rng.choice(size, kept, replace=False)] = True
        start = np.where(mask, np.float32(1), np.float32(0.99))
        start = start if case["start"] == "initial" else make_scores(rng, size, case["start"])
        layer.mask = torch.from_numpy(mask.reshape(layer.weight.shape))
        with torch.no_grad():
            layer.scores.copy_(torch.from_numpy(start.reshape(layer.weight.shape)))
        groups.append(
            {"params": [layer.scores], **hyper, "nesterov": hyper["nesterov"] and hyper["momentum"] > 0}
        )
        masks.append(mask)
        scores.append(start)
    if case["cached"]:
        fill_caches(model)
    names = [name for name, _ in layers]
    options = {key: case[key] for key in ("total_steps", "scope", "schedule", "pairs", "ramp", "ramp_end")}
    optimizer = jk.SRPopup(
        model,
        params=groups,
        final_sparsity=dict(zip(names, case["final"], strict=True)),
        swap_every=case["swap_every"],
        seed=case["seed"],
        **options,
    )
    joint = case["scope"] == "global"
    search = oracle.Search(
        scores,
        masks,
        rates=rate_table(case["schedule"], case["total_steps"]).tolist(),
        last_kept=[sum(case["final"])] if joint else case["final"],
        ramp=ramp_table(case["ramp"], case["total_steps"], case["ramp_end"]).tolist(),
        joint=joint,
        pairs=case["pairs"],
        seed=case["seed"],
        swap_every=case["swap_every"],
    )
    return model, optimizer, search


def step_both(case, model, optimizer, search, styles, rng, bad=False):
    """One step with the same gradients for both; `bad` plants one value that is not finite."""
    layers = list(jk.masked_layers(model).values())
    grads = [make_grad(rng, layer.weight.numel(), style) for layer, style in zip(layers, styles, strict=True)]
    present = [grad for grad in grads if grad is not None]
    if bad and present:
        present[-1][rng.integers(present[-1].size)] = rng.choice([np.nan, np.inf, -np.inf])
    for layer, grad in zip(layers, grads, strict=True):
        layer.scores.grad = (
            None if grad is None else torch.from_numpy(grad.reshape(layer.weight.shape).copy())
        )
    scale = case["scale"]
    if scale is not None:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
    optimizer.step()
    inv_scale = 1.0 if scale is None else 1 / scale
    rows = [
        (g["lr"] * g["step_scale"], g["momentum"], g["weight_decay"], g["nesterov"], inv_scale)
        for g in optimizer.param_groups
    ]
    return search.step(grads, rows)


@settings(max_examples=150, deadline=None)
@given(case=searches())
def test_every_step_has_the_bits_of_the_oracle(case):
    rng = np.random.default_rng(case["data"])
    model, optimizer, search = start_both(case, rng)
    weights = [layer.weight.detach().clone() for layer in model]
    for t in range(1, case["total_steps"] + 1 + (case["bad_step"] > 0)):
        if search.steps == case["total_steps"]:
            break
        styles = [case["grads"][(t + i) % len(case["grads"])] for i in range(len(case["shapes"]))]
        swaps = step_both(case, model, optimizer, search, styles, rng, bad=t == case["bad_step"])
        assert_same(optimizer, model, search, swaps)
        assert_kept(search)
        if case["schedule"] == "constant" and search.steps and search.swapped_at == search.steps:
            assert_top_k(search)
    for layer, weight in zip(model, weights, strict=True):
        assert torch.equal(layer.weight.view(torch.int32), weight.view(torch.int32))
        assert layer.weight.stride() == weight.stride()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("schedule", "gradients", "threads"),
    [("quartic", "drift", 2), ("quartic", "ties", 1), ("constant", "drift", 1), ("constant", "ties", 1)],
    indirect=["threads"],
)
def test_a_long_search_of_large_layers_has_the_bits_of_the_oracle(scope, schedule, gradients, threads):
    """Hundreds of steps over layers of many tiles, with missing gradients, skipped steps and a ramp."""
    total_steps, shapes = 150, [(1, 1), (97, 131), (24, 16, 3, 3), (10, 25)]
    sizes = [math.prod(shape) for shape in shapes]
    case = {
        "shapes": shapes,
        "kept": [math.ceil(size * 0.2) for size in sizes],
        "final": [math.ceil(size * 0.1) for size in sizes],
        "start": "initial",
        "channels_last": True,
        "cached": True,
        "hyper": [{"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": False, "step_scale": 1.0}]
        * 4,
        "total_steps": total_steps,
        "scope": scope,
        "schedule": schedule,
        "pairs": "best",
        "ramp": "cubic",
        "ramp_end": 0.5,
        "swap_every": 1,
        "seed": 0,
        "scale": 1024.0 if gradients == "drift" else None,
    }
    rng = np.random.default_rng(7)
    model, optimizer, search = start_both(case, rng)
    calls = 0
    while search.steps < total_steps:
        calls += 1
        style = "random" if gradients == "drift" else "ties"
        styles = ["none" if calls % 40 == 0 and i == 1 else style for i in range(len(shapes))]
        swaps = step_both(case, model, optimizer, search, styles, rng, bad=calls % 37 == 0)
        assert_same(optimizer, model, search, swaps)
        assert_kept(search)
        if schedule == "constant":
            assert_top_k(search)
    assert search.skipped == calls - total_steps > 0
    assert [int(mask.sum()) for mask in search.masks] == case["final"] or scope == "global"


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_sparsity_zero_moves_no_mask(scope):
    model = make_model([(7, 5), (4, 3, 3, 3)])
    jk.initialize(model, sparsity=0.0, keep_last_dense=False)
    optimizer = jk.SRPopup(model, total_steps=5, scope=scope, schedule="constant")
    for _ in range(5):
        for layer in model:
            layer.scores.grad = torch.randn_like(layer.scores)
        optimizer.step()
        assert all(bool(layer.mask.all()) for layer in model)
        assert all(stat.proposed == 0 for stat in optimizer.stats().values())


def test_the_start_of_a_search_has_the_masks_of_the_oracle():
    model = make_model([(30, 20), (8, 5, 3, 3)], channels_last=True)
    for layer in model:
        nn.init.normal_(layer.weight)
    jk.initialize(model, sparsity=0.9, keep_last_dense=False)
    magnitudes = np.concatenate([np.abs(numpy_of(layer.weight)) for layer in model])
    kept = np.zeros(magnitudes.size, bool)
    kept[oracle.ranking(magnitudes)[: magnitudes.size - math.ceil(Fraction("0.9") * magnitudes.size)]] = True
    np.testing.assert_array_equal(np.concatenate([numpy_of(layer.mask) for layer in model]), kept)


def test_the_oracle_rounds_once():
    rng = np.random.default_rng(3)
    for scale in range(-150, 40, 10):
        a, b = rng.standard_normal((2, 40)).astype(np.float32)
        a = np.ldexp(a, scale).astype(np.float32)
        product = (a.astype(np.float64) * b).astype(np.float32)
        for c in (np.ldexp(product, 12).astype(np.float32), -product, rng.permutation(product)):
            exact = [
                oracle.round_to_float32(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
                for x, y, z in zip(a, b, c, strict=True)
            ]
            np.testing.assert_array_equal(oracle.fma(a, b, c), np.array(exact, np.float32))
