"""SRPopup as an optimizer: groups, schedulers, scaled losses, resume, copies, and every bad input."""

import copy
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import jackpot_kernels as jk
from jackpot_kernels.search import SwapStats


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Layers of a few weights gain nothing from threads, and wait long for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Network(nn.Module):
    """A convolution, a nested linear layer and a head that initialize keeps dense."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 33), nn.ReLU())
        self.head = nn.Linear(33, 5)

    def forward(self, x):
        return self.head(self.block(self.conv(x).relu().mean((2, 3))))


def make_network(sparsity=0.8, seed=0):
    torch.manual_seed(seed)
    model = jk.convert(Network())
    jk.initialize(model, sparsity=sparsity, budget="uniform")
    return model


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 3, 6, 6, generator=generator), torch.randint(5, (16,), generator=generator)


def loss_of(model, step):
    x, y = batch(step)
    return 30 * nn.functional.cross_entropy(model(x), y)


@pytest.fixture(params=[torch.bfloat16, torch.float64])
def default_dtype(request):
    """Another one than float32."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_scores_are_float32_whatever_the_default_is(default_dtype, criterion):
    model = jk.convert(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)))
    assert model[0].weight.dtype == default_dtype
    jk.initialize(model, 0.5, criterion)
    optimizer = jk.SRPopup(model, total_steps=2)
    model(torch.randn(8, 6)).sum().backward()
    optimizer.step()
    assert model[0].scores.dtype == torch.float32 and optimizer.steps == 1


def test_the_default_device_is_not_asked():
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=3)
    run(model, optimizer, range(2))
    with torch.device("meta"):
        optimizer.load_state_dict(optimizer.state_dict())
    run(model, optimizer, [2])
    assert optimizer.steps == 3


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lr": float("nan")}, "lr must be finite in float32 and at least 0, got nan"),
        ({"lr": torch.tensor(-1.0)}, "lr must be finite in float32 and at least 0, got -1.0"),
        ({"lr": "0.2"}, "lr must be a number, got str"),
        ({"lr": 0.1j}, "lr must be a number, got complex"),
        ({"lr": torch.tensor(0.1j)}, "lr must be one real number, got torch.complex64"),
        ({"lr": torch.ones(2)}, "lr must be one real number, got torch.float32 .2."),
        ({"momentum": float("inf")}, "momentum must be finite in float32 and at least 0, got inf"),
        ({"weight_decay": float("nan")}, "weight_decay must be finite in float32 and at least 0, got nan"),
        ({"step_scale": None}, "step_scale must be a number, got NoneType"),
        ({"nesterov": "yes"}, "nesterov must be a bool, got str"),
        ({"nesterov": True, "momentum": 0.0}, "momentum must be above 0 for nesterov, got 0"),
    ],
)
def test_a_bad_number_in_a_group_changes_nothing(change, sentence, lr):
    model = make_network()
    optimizer = jk.SRPopup(model, lr=lr, total_steps=3)
    run(model, optimizer, range(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "norm" not in name}
    optimizer.param_groups[0].update(change)
    loss_of(model, 1).backward()
    with pytest.raises((TypeError, ValueError), match=sentence):
        optimizer.step()
    for name, tensor in before.items():
        assert "running" in name or "tracked" in name or torch.equal(model.state_dict()[name], tensor), name
    optimizer.param_groups[0].update(lr=lr, momentum=0.9, weight_decay=0.0, nesterov=False, step_scale=1.0)
    optimizer.step()
    assert optimizer.steps == 2


def run(model, optimizer, steps, scheduler=None):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def plant_gradients(model, step):
    """Gradients that depend on nothing but the step, for tests that compare two ways of stepping."""
    generator = torch.Generator().manual_seed(step)
    for layer in jk.masked_layers(model).values():
        layer.scores.grad = torch.randn(layer.scores.shape, generator=generator)


def snapshot(model, optimizer=None):
    """All numbers of a search, copied, so that a change shows."""
    state = copy.deepcopy(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict() if optimizer else None}
    )
    return flatten(state)


def flatten(value, path=""):
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{path}/{key}").items()}
    if isinstance(value, list):
        return flatten(dict(enumerate(value)), path)
    return {path: value}


def assert_equal(a, b, ignore=()):
    assert a.keys() == b.keys()
    for path, value in a.items():
        if not any(word in path for word in ignore):
            same = torch.equal(value, b[path]) if isinstance(value, torch.Tensor) else value == b[path]
            assert same, path


# As an optimizer of torch.


def test_update_is_that_of_torch_sgd():
    """Scores follow torch.optim.SGD within rounding, group by group."""
    model = make_network()
    scores = [layer.scores for layer in jk.masked_layers(model).values()]
    twins = [nn.Parameter(s.detach().clone()) for s in scores]
    options = [
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.02, "momentum": 0.0, "weight_decay": 0.1},
    ]
    groups = [{"params": [s], **o} for s, o in zip(scores, options, strict=False)]
    optimizer = jk.SRPopup(model, params=groups, total_steps=20)
    sgd = torch.optim.SGD(
        [{"params": [t], **o} for t, o in zip(twins, options, strict=False)],
        lr=0.1,
        momentum=0.9,
        weight_decay=5e-4,
    )
    for step in range(20):
        plant_gradients(model, step)
        for score, twin in zip(scores, twins, strict=True):
            twin.grad = score.grad.clone()
        optimizer.step()
        sgd.step()
    for score, twin in zip(scores[:2], twins, strict=False):
        torch.testing.assert_close(score, twin, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=12),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.4, total_steps=13),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.8)],
            milestones=[4],
        ),
    ],
)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_any_scheduler_sets_lr_and_momentum(make_scheduler, tensor_lr):
    model = make_network()
    layer = model.conv
    twin = nn.Parameter(layer.scores.detach().clone())
    optimizer = jk.SRPopup(model, lr=torch.tensor(0.1) if tensor_lr else 0.1, total_steps=12)
    sgd = torch.optim.SGD([twin], lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler, twin_scheduler = make_scheduler(optimizer), make_scheduler(sgd)
    for step in range(12):
        plant_gradients(model, step)
        twin.grad = layer.scores.grad.clone()
        optimizer.step()
        sgd.step()
        scheduler.step()
        twin_scheduler.step()
    torch.testing.assert_close(layer.scores, twin, rtol=1e-5, atol=1e-5)


def test_a_tensor_lr_has_the_bits_of_a_float():
    results = []
    for lr in (0.1, torch.tensor(0.1), torch.tensor([0.1])):
        model = make_network()
        run(model, jk.SRPopup(model, lr=lr, total_steps=6), range(6))
        results.append(snapshot(model))
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


def test_a_number_replaces_a_tensor_lr():
    model = make_network()
    optimizer = jk.SRPopup(model, lr=torch.tensor(0.1), total_steps=6)
    run(model, optimizer, range(2))
    optimizer.param_groups[0]["lr"] = 0.0
    before = model.conv.scores.detach().clone()
    run(model, optimizer, range(2, 4))
    assert torch.equal(model.conv.scores, before)


def test_step_scale_multiplies_lr():
    results = []
    for lr, scale in ((0.05, 1.0), (0.1, 0.5), (torch.tensor(0.1), 0.5)):
        model = make_network()
        params = [{"params": [model.conv.scores], "step_scale": scale, "lr": lr}]
        run(model, jk.SRPopup(model, params=params, total_steps=6), range(6))
        results.append(snapshot(model))
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


@pytest.mark.parametrize("form", ["tensors", "named", "groups", "generator"])
def test_params_takes_every_form_of_torch(form):
    expected = make_network()
    run(expected, jk.SRPopup(expected, total_steps=5), range(5))
    model = make_network()
    scores = [model.conv.scores, model.block[1].scores]
    params = {
        "tensors": scores,
        "named": list(zip(["a", "b"], scores, strict=True)),
        # The order of groups is not the order of layers: positions stay those of the model.
        "groups": [{"params": scores[1]}, {"params": [scores[0]]}],
        "generator": iter(scores),
    }[form]
    run(model, jk.SRPopup(model, params=params, total_steps=5), range(5))
    assert_equal(snapshot(model), snapshot(expected))


def test_layers_that_no_group_names_are_left_alone():
    model = make_network()
    before = snapshot(model.conv)
    optimizer = jk.SRPopup(model, params=[model.block[1].scores], total_steps=5, scope="global")
    mask = model.block[1].mask
    run(model, optimizer, range(5))
    assert_equal(snapshot(model.conv), before)
    assert not torch.equal(model.block[1].mask, mask)


class Reader(nn.Module):
    """Attention often reads weights as this does."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.called(nn.functional.linear(x, self.read.weight))


def test_a_layer_that_is_read_and_never_called_is_named_once():
    model = jk.convert(nn.Sequential(Reader(), nn.Linear(4, 2)))
    jk.initialize(model, 0.5)
    optimizer = jk.SRPopup(model, total_steps=2)
    model(torch.randn(3, 4)).sum().backward()
    with pytest.warns(UserWarning, match=r"no gradient has reached '0\.read'; ") as caught:
        optimizer.step()
    assert caught[0].filename == __file__ and len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_the_dense_head_is_not_searched():
    model = make_network()
    before = snapshot(model.head)
    run(model, optimizer := jk.SRPopup(model, total_steps=5, scope="global"), range(5))
    assert_equal(snapshot(model.head), before)
    assert optimizer.param_groups[0]["param_names"] == ["conv", "block.1"]


def test_a_single_layer_is_a_model():
    model = jk.convert(nn.Linear(12, 10))
    jk.initialize(model, sparsity=0.5, keep_last_dense=False)
    optimizer = jk.SRPopup(model, total_steps=3)
    for step in range(3):
        plant_gradients(model, step)
        optimizer.step()
    assert model.num_kept == 60
    assert list(optimizer.stats()) == [""]


def test_a_shared_layer_is_searched_once():
    model = jk.convert(nn.Sequential(shared := nn.Linear(6, 6), nn.ReLU(), shared))
    jk.initialize(model, sparsity=0.5, keep_last_dense=False)
    optimizer = jk.SRPopup(model, total_steps=3)
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    assert list(optimizer.stats()) == ["0"]


def test_accumulated_gradients_are_one_step():
    model, twin = make_network(), make_network()
    optimizer, twin_optimizer = (jk.SRPopup(m, total_steps=4) for m in (model, twin))
    for step in range(0, 8, 2):
        optimizer.zero_grad()
        for micro in (step, step + 1):
            loss_of(model, micro).backward()
        optimizer.step()
        model_grads = []
        for micro in (step, step + 1):
            twin.zero_grad()
            loss_of(twin, micro).backward()
            model_grads.append([layer.scores.grad for layer in jk.masked_layers(twin).values()])
        for layer, first, second in zip(jk.masked_layers(twin).values(), *model_grads, strict=True):
            layer.scores.grad = None if first is None else first + second
        twin_optimizer.step()
    assert_equal(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_the_scores(set_to_none):
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=2)
    loss_of(model, 0).backward()
    optimizer.zero_grad(set_to_none)
    grad = model.conv.scores.grad
    assert grad is None if set_to_none else not grad.any()


def test_a_closure_computes_loss_and_gradients():
    model, twin = make_network(), make_network()
    optimizer, twin_optimizer = (jk.SRPopup(m, total_steps=4) for m in (model, twin))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    for step in range(4):
        loss = optimizer.step(closure)
        assert loss.requires_grad
        twin_optimizer.zero_grad()
        loss_of(twin, step).backward()
        assert twin_optimizer.step() is None
    assert_equal(snapshot(model), snapshot(twin))


def test_a_mask_that_the_closure_writes_is_looked_at():
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=4)
    run(model, optimizer, range(1))
    before = flatten(copy.deepcopy([model.conv.scores, optimizer.state_dict()]))
    with pytest.raises(RuntimeError, match=r"layer 'conv' must keep 43 weights at step 1 .* got 216"):
        optimizer.step(lambda: replace_mask(model))
    assert_equal(flatten(copy.deepcopy([model.conv.scores, optimizer.state_dict()])), before)


def test_a_seed_may_be_numpys():
    seed = jk.SRPopup(make_network(), total_steps=4, seed=np.int64(3)).state_dict()["search"]["seed"]
    assert type(seed) is int and seed == 3


def test_hooks_see_every_step():
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=3)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    run(model, optimizer, range(2))
    assert seen == ["before", "after"] * 2


def test_a_gradient_of_any_strides_is_taken_in_logical_order():
    model, twin = make_network(), make_network()
    optimizer, twin_optimizer = (jk.SRPopup(m, total_steps=2) for m in (model, twin))
    plant_gradients(model, 0)
    plant_gradients(twin, 0)
    model.conv.scores.grad = model.conv.scores.grad.contiguous(memory_format=torch.channels_last)
    optimizer.step()
    twin_optimizer.step()
    assert_equal(snapshot(model, optimizer), snapshot(twin, twin_optimizer))


# Under a loss scale.


def test_a_scaled_loss_has_the_bits_of_a_plain_one():
    model, twin = make_network(), make_network()
    optimizer, twin_optimizer = (jk.SRPopup(m, total_steps=6) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    run(twin, twin_optimizer, range(6))
    assert scaler.get_scale() > 2.0**10
    assert_equal(snapshot(model, optimizer), snapshot(twin, twin_optimizer))


def test_a_plain_step_after_a_scaled_one_is_not_scaled():
    model, twin = make_network(), make_network()
    optimizer, twin_optimizer = (jk.SRPopup(m, total_steps=2) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()
    run(twin, twin_optimizer, range(2))
    assert_equal(snapshot(model, optimizer), snapshot(twin, twin_optimizer))


def test_unscaled_gradients_may_be_clipped_before_the_step():
    model, twin = make_network(), make_network()
    optimizer, twin_optimizer = (jk.SRPopup(m, total_steps=2) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    loss_of(twin, 0).backward()
    for m in (model, twin):
        nn.utils.clip_grad_norm_([m.conv.scores, m.block[1].scores], 0.1)
    scaler.step(optimizer)
    scaler.update()
    twin_optimizer.step()
    assert_equal(snapshot(model, optimizer), snapshot(twin, twin_optimizer))


def test_the_scaler_skips_a_step_that_overflowed():
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = snapshot(model, optimizer)
    plant_gradients(model, 0)
    model.conv.scores.grad[0, 0, 0, 0] = math.nan
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert (optimizer.steps, optimizer.skipped_steps) == (0, 1)
    assert_equal(snapshot(model, optimizer), before, ignore=["control"])


def test_a_found_inf_skips_the_step_though_its_own_gradients_are_finite():
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=2)
    before = snapshot(model, optimizer)
    plant_gradients(model, 0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_equal(snapshot(model, optimizer), before, ignore=["control"])


def test_a_scaled_step_that_failed_leaves_no_scale():
    model, twin = make_network(), make_network()
    optimizer, twin_optimizer = (jk.SRPopup(m, total_steps=2) for m in (model, twin))
    plant_gradients(model, 0)
    plant_gradients(twin, 0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    twin_optimizer.step()
    assert_equal(snapshot(model, optimizer), snapshot(twin, twin_optimizer))


# What a step reports and refuses.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_skips_the_whole_step(value):
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=5)
    run(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    plant_gradients(model, 9)
    model.block[1].scores.grad[-1, -1] = value
    optimizer.step()
    assert_equal(snapshot(model, optimizer), before, ignore=["control"])
    assert (optimizer.steps, optimizer.skipped_steps) == (2, 1)
    assert set(optimizer.stats().values()) == {SwapStats(0, 0, 0, 0.0)}
    run(model, optimizer, range(2, 5))
    assert (optimizer.steps, optimizer.skipped_steps) == (5, 1)


def test_a_step_past_the_last_is_refused():
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=3)
    for step, bad in enumerate([False, True, False, True, False]):
        plant_gradients(model, step)
        if bad:
            model.conv.scores.grad.fill_(math.nan)
        optimizer.step()
    before = snapshot(model, optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="total_steps = 3 steps, got one more"):
            optimizer.step(lambda: pytest.fail("the closure must not run"))
    assert_equal(snapshot(model, optimizer), before)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_stats_tell_what_the_swap_did(scope):
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=8, scope=scope)
    names = ["conv", "block.1"] if scope == "layer" else ["global"]
    assert optimizer.stats() == dict.fromkeys(names, SwapStats(0, 0, 0, 0.0))
    layers = [model.conv, model.block[1]]
    for step in range(8):
        before = torch.cat([layer.mask.flatten() for layer in layers])
        run(model, optimizer, [step])
        stats = optimizer.stats()
        assert list(stats) == names
        assert all(s.proposed == s.granted + s.skipped for s in stats.values())
        changed = int((torch.cat([layer.mask.flatten() for layer in layers]) != before).sum())
        assert changed == 2 * sum(s.granted for s in stats.values())
    scores = torch.cat([layer.scores.flatten() for layer in layers])
    thresholds = {s.threshold for s in stats.values()}
    assert thresholds <= set(scores.tolist())


def test_weights_keep_their_bits_and_every_layer_its_count():
    model = make_network()
    weights = {name: layer.weight.clone() for name, layer in jk.masked_layers(model).items()}
    kept = {name: layer.num_kept for name, layer in jk.masked_layers(model).items()}
    optimizer = jk.SRPopup(model, total_steps=10, schedule="constant")
    start = model.conv.mask
    for step in range(10):
        run(model, optimizer, [step])
        for name, layer in jk.masked_layers(model).items():
            assert layer.num_kept == kept[name] == int(layer.mask.sum())
            cached = layer.cached_effective_weight
            assert cached is not None and torch.equal(cached, layer.weight * layer.mask)
    assert not torch.equal(model.conv.mask, start)
    for name, layer in jk.masked_layers(model).items():
        assert torch.equal(layer.weight.view(torch.int32), weights[name].view(torch.int32))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("swap_every", [1, 4])
def test_a_ramp_ends_at_the_final_sparsity(scope, swap_every):
    model = make_network(sparsity=0.5)
    optimizer = jk.SRPopup(
        model, total_steps=10, scope=scope, final_sparsity=0.9, ramp_end=0.8, swap_every=swap_every
    )
    kept = []
    for step in range(10):
        run(model, optimizer, [step])
        kept.append(model.conv.num_kept + model.block[1].num_kept)
    numel = model.conv.weight.numel() + model.block[1].weight.numel()
    assert kept[-1] == numel - math.ceil(0.9 * numel)
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]
    assert jk.sparsity(model).masked == pytest.approx(1 - kept[-1] / numel)


def test_a_ramp_may_be_given_layer_by_layer():
    model = make_network(sparsity=0.5)
    kept = model.block[1].num_kept
    optimizer = jk.SRPopup(model, total_steps=4, final_sparsity={"conv": 7}, ramp="linear", ramp_end=1.0)
    run(model, optimizer, range(4))
    assert (model.conv.num_kept, model.block[1].num_kept) == (7, kept)


def replace_layer(model):
    model.block[1] = nn.Linear(8, 33)


def replace_block(model):
    model.block = copy.deepcopy(model.block)


def replace_scores(model):
    model.conv.scores = nn.Parameter(model.conv.scores.detach().clone())


def replace_mask(model):
    mask = model.conv.mask
    mask.view(-1)[:] = True
    model.conv.mask = mask


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_layer, "module 'block.1' must be the one the optimizer was made for, got another"),
        (replace_block, "module 'block' must be the one the optimizer was made for, got another"),
        (replace_scores, "scores of 'conv' must be those the optimizer was made for, got others"),
        (jk.finalize, "module 'conv' must be the one the optimizer was made for"),
        (replace_mask, "layer 'conv' must keep 43 weights at step 2 of the search, got 216"),
        (
            lambda model: jk.initialize(model, 0.5, budget="uniform"),
            "layer 'conv' must keep 43 weights .* got 108",
        ),
        (lambda model: model.to("meta"), "layer 'conv' must stay on cpu, got meta"),
    ],
)
def test_a_model_that_changed_is_refused(change, message):
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=10)
    run(model, optimizer, range(2))
    scores = model.conv.scores
    change(model)
    before, state = scores.detach().clone(), flatten(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
    assert scores.device.type == "meta" or torch.equal(scores, before)
    assert_equal(flatten(optimizer.state_dict()), state)


def test_another_mask_with_the_same_count_is_welcome():
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=4)
    model.conv.mask = model.conv.mask.flip(0)
    run(model, optimizer, range(4))
    assert model.conv.num_kept == 43


def test_dtype_and_memory_format_may_change_in_mid_search():
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=4, schedule="constant")
    run(model, optimizer, range(2))
    model.to(memory_format=torch.channels_last)
    model.double()
    for step in (2, 3):
        plant_gradients(model, step)
        optimizer.step()
    assert model.conv.scores.dtype == torch.float32
    model(batch(0)[0].double())
    cached = model.conv.cached_effective_weight
    assert torch.equal(cached, model.conv.weight * model.conv.mask)


def test_the_effective_weight_of_another_dtype_is_patched():
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=4, schedule="constant")
    run(model, optimizer, range(1))
    model.double()
    for step in (1, 2):
        model(batch(0)[0].double())
        kept = model.conv.cached_effective_weight
        plant_gradients(model, step)
        optimizer.step()
        assert model.conv.cached_effective_weight is kept
        assert torch.equal(kept, model.conv.weight * model.conv.mask)


BAD_ARGUMENTS = [
    ({"lr": -0.1}, ValueError, "lr must be finite in float32 and at least 0, got -0.1"),
    ({"lr": math.nan}, ValueError, "lr must be finite in float32 and at least 0, got nan"),
    ({"lr": "0.1"}, TypeError, "lr must be a number, got str"),
    ({"lr": torch.ones(2)}, ValueError, r"lr must be one real number, got torch.float32 \[2\]"),
    ({"momentum": -1.0}, ValueError, "momentum must be finite in float32 and at least 0, got -1.0"),
    (
        {"weight_decay": math.inf},
        ValueError,
        "weight_decay must be finite in float32 and at least 0, got inf",
    ),
    ({"nesterov": "no"}, TypeError, "nesterov must be a bool, got str"),
    ({"nesterov": True, "momentum": 0.0}, ValueError, "momentum must be above 0 for nesterov, got 0"),
    ({"total_steps": 0}, ValueError, "total_steps must be at least 1, got 0"),
    ({"total_steps": 1.5}, TypeError, "total_steps must be an integer, got float"),
    ({"scope": "network"}, ValueError, "scope must be one of layer, global, got 'network'"),
    ({"schedule": "cosine"}, ValueError, "schedule must be one of quartic, inverse, constant, single"),
    ({"pairs": "worst"}, ValueError, "pairs must be one of best, inverse, random, got 'worst'"),
    ({"ramp": "square"}, ValueError, "ramp must be one of cubic, linear"),
    ({"ramp_end": 0}, ValueError, "ramp_end must be in .0, 1., got 0"),
    ({"swap_every": 0}, ValueError, "swap_every must be at least 1, got 0"),
    ({"seed": -1}, ValueError, "seed must be in .0, 2..63., got -1"),
    ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
    ({"final_sparsity": 1.0}, ValueError, "final_sparsity must be in .0, 1., got 1.0"),
    ({"final_sparsity": math.nan}, ValueError, "final_sparsity must be in .0, 1., got nan"),
    ({"final_sparsity": "0.9"}, TypeError, "final_sparsity must be a number or a dict of counts, got str"),
    ({"final_sparsity": 0.5}, ValueError, "final_sparsity must be from the present 0.8.* to .*, got 0.5"),
    ({"final_sparsity": 0.999}, ValueError, "final_sparsity must be from the present .*, got 0.999"),
    ({"final_sparsity": {"stem": 3}}, ValueError, "final_sparsity must name searched layers, got 'stem'"),
    ({"final_sparsity": {"head": 3}}, ValueError, "final_sparsity must name searched layers, got 'head'"),
    (
        {"final_sparsity": {"conv": 0}},
        ValueError,
        "final_sparsity of 'conv' must be in .1, 43. weights, got 0",
    ),
    (
        {"final_sparsity": {"conv": 99}},
        ValueError,
        "final_sparsity of 'conv' must be in .1, 43. weights, got 99",
    ),
    (
        {"final_sparsity": {"conv": 0.5}},
        TypeError,
        "final_sparsity of 'conv' must be an integer count, got float",
    ),
    (
        {"params": [torch.ones(2, 3)]},
        ValueError,
        r"params must be scores of the model's masked layers, got \(2, 3\)",
    ),
    ({"params": []}, ValueError, "empty parameter list"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_named_and_changes_nothing(arguments, error, message):
    model = make_network()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        jk.SRPopup(model, **{"total_steps": 5, **arguments})
    assert_equal(snapshot(model), before)


def test_models_without_anything_to_search_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        jk.SRPopup([nn.Parameter(torch.ones(1))], total_steps=5)
    with pytest.raises(ValueError, match="model must hold masked layers to search"):
        jk.SRPopup(nn.Linear(2, 2), total_steps=5)
    frozen = make_network()
    for layer in jk.masked_layers(frozen).values():
        layer.scores.requires_grad_(False)
    with pytest.raises(ValueError, match="model must hold masked layers to search"):
        jk.SRPopup(frozen, total_steps=5)


def test_scores_of_inference_mode_are_refused():
    with torch.inference_mode():
        model = make_network()
    with pytest.raises(ValueError, match=r"scores of 'conv' must be made outside torch\.inference_mode"):
        jk.SRPopup(model, total_steps=5)


def test_a_sharded_model_is_refused(shard):
    with pytest.raises(TypeError, match=r"scores of 'conv' must be a plain tensor, got a DTensor"):
        jk.SRPopup(shard(make_network()), total_steps=5)


def test_scores_in_two_groups_are_refused():
    model = make_network()
    scores = model.conv.scores
    with pytest.raises(ValueError, match="more than one parameter group"):
        jk.SRPopup(model, params=[{"params": [scores]}, {"params": [scores]}], total_steps=5)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="params must name each scores once, got 'conv'"),
    ):
        jk.SRPopup(model, params=[scores, scores], total_steps=5)


def test_a_group_that_comes_later_is_refused():
    model = make_network()
    optimizer = jk.SRPopup(model, params=[model.conv.scores], total_steps=5)
    with pytest.raises(RuntimeError, match="params must hold every group when the optimizer is made"):
        optimizer.add_param_group({"params": [model.block[1].scores]})
    assert len(optimizer.param_groups) == 1


# Resume and copies.

SEARCH = {"nesterov": True, "total_steps": 14, "schedule": "quartic", "final_sparsity": 0.9, "ramp_end": 0.9}


def begin(**options):
    model = make_network(sparsity=0.6)
    groups = [
        {"params": [model.block[1].scores], "lr": 0.05},
        {"params": [model.conv.scores], "step_scale": 2.0},
    ]
    optimizer = jk.SRPopup(model, params=groups, **{**SEARCH, **options})
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)


def go_on(model, optimizer, scheduler, steps):
    """Steps of which every fourth is skipped; the step's number decides its batch."""
    for step in steps:
        optimizer.zero_grad()
        (loss_of(model, step) * (math.nan if step % 4 == 3 else 1)).backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("pairs", ["best", "random"])
@pytest.mark.parametrize("model_first", [True, False])
def test_a_resumed_search_has_the_bits_of_an_unbroken_one(scope, pairs, model_first):
    unbroken = begin(scope=scope, pairs=pairs, seed=3)
    go_on(*unbroken, range(16))
    first = begin(scope=scope, pairs=pairs, seed=3)
    go_on(*first, range(7))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    go_on(*first, range(7, 9))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    # Nothing of the search is given again: schedule, pairs, seed and ramp come from the file.
    second = begin(scope=scope, schedule="constant", final_sparsity=None)
    loads = list(zip(second, saved, strict=True))
    for part, state in loads if model_first else reversed(loads):
        part.load_state_dict(state)
    assert second[1].steps == first[1].steps - 1
    go_on(*second, range(7, 16))
    assert unbroken[1].skipped_steps > 2
    assert_equal(snapshot(*second[:2]), snapshot(*unbroken[:2]))


def test_loading_copies_the_state():
    saved = begin()[1].state_dict()
    before = flatten(copy.deepcopy(saved))
    twin, twin_optimizer, twin_scheduler = begin()
    twin_optimizer.load_state_dict(saved)
    go_on(twin, twin_optimizer, twin_scheduler, range(3))
    assert_equal(flatten(saved), before)


def test_a_wrapper_around_the_model_does_not_hinder_a_resume():
    model, optimizer, _ = begin()

    class Wrapper(nn.Module):
        """Names layers as DistributedDataParallel does."""

        def __init__(self, module):
            super().__init__()
            self.module = module

    params = [{"params": g["params"], "lr": g["lr"]} for g in optimizer.param_groups]
    wrapped = jk.SRPopup(Wrapper(model), params=params, **SEARCH)
    assert list(wrapped.stats()) == ["module.conv", "module.block.1"]
    wrapped.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(wrapped.state_dict())


def with_entry(state, path, value):
    """A copy of `state` with one entry changed, or removed when `value` is None."""
    state = copy.deepcopy(state)
    *parents, last = path
    place = state
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return state


BAD_STATES = [
    (("search",), None, "state_dict must come from SRPopup.state_dict.., got one without 'search'"),
    (("state",), None, "state_dict must come from SRPopup.state_dict.., got one without 'state'"),
    (("search", "seed"), None, "state_dict must come from SRPopup"),
    (("search", "scope"), "global", "state_dict must have scope layer, got global"),
    (("search", "total_steps"), 15, "state_dict must have total_steps 14, got 15"),
    (("search", "seed"), -1, "seed must be in .0, 2..63., got -1"),
    (("search", "table"), [], "table of state_dict must be a tensor .* got list"),
    (("search", "pairs"), "worst", "pairs of state_dict must be one of"),
    (
        ("search", "table"),
        torch.zeros(13, 2, dtype=torch.float64),
        r"table of state_dict must be a tensor torch.float64 \[14, 2\], got torch.float64 \[13, 2\]",
    ),
    (
        ("search", "table"),
        torch.full((14, 2), 2.0, dtype=torch.float64),
        "state_dict must hold rates in .0, 1.",
    ),
    (("search", "control"), torch.tensor([15, 0, 0]), "and a step within them, got step 15"),
    (("search", "control"), torch.zeros(3), "control of state_dict must be a tensor torch.int64"),
    (("search", "num_kept"), torch.tensor([[9, 9], [999, 9]]), "num_kept of state_dict must fit the layers"),
    (("search", "num_kept"), torch.tensor([[9, 9], [9, 10]]), "num_kept of state_dict must fit the layers"),
    (("search", "num_kept"), torch.tensor([[9, 9], [9, 0]]), "num_kept of state_dict must fit the layers"),
    (("param_groups", 1), None, r"must hold \(group, layer\) \(1, 'conv'\), got None"),
    (
        ("param_groups", 0, "param_names"),
        ["head"],
        r"must hold \(group, layer\) \(0, 'block.1'\), got \(0, 'head'\)",
    ),
    (("param_groups", 0, "step_scale"), None, "groups of state_dict must hold step_scale, got one without"),
    (("param_groups", 1, "lr"), math.nan, "lr must be finite in float32 and at least 0, got nan"),
    (
        ("state", 0, "momentum_buffer"),
        torch.zeros(33, 8).to_sparse(),
        "got torch.float32 .* torch.sparse_coo",
    ),
    (("state", 0), None, r"momentum_buffer 0 must be a tensor torch.float32 \[33, 8\], got NoneType"),
    (
        ("state", 0, "momentum_buffer"),
        torch.zeros(8, 33),
        r"momentum_buffer 0 must be a tensor .* got torch.float32 \[8, 33\]",
    ),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_STATES)
def test_the_state_of_another_search_is_refused(path, value, message):
    model, optimizer, scheduler = begin()
    go_on(model, optimizer, scheduler, range(3))
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(with_entry(optimizer.state_dict(), path, value))
    assert_equal(snapshot(model, optimizer), before)


def test_the_state_of_another_optimizer_is_refused():
    model, optimizer, _ = begin()
    sgd = torch.optim.SGD([layer.scores for layer in (model.conv, model.block[1])], lr=0.1)
    with pytest.raises(ValueError, match="state_dict must come from SRPopup"):
        optimizer.load_state_dict(sgd.state_dict())
    with pytest.raises(TypeError, match="state_dict must be a dict, got int"):
        optimizer.load_state_dict(5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_by_itself(copied):
    model, optimizer, scheduler = begin()
    go_on(model, optimizer, scheduler, range(4))
    twin, twin_optimizer = copied((model, optimizer))
    assert_equal(snapshot(twin, twin_optimizer), snapshot(model, optimizer))
    run(model, optimizer, range(4, 9))
    assert twin_optimizer.steps == 3
    run(twin, twin_optimizer, range(4, 9))
    assert_equal(snapshot(twin, twin_optimizer), snapshot(model, optimizer))


def test_it_prints_as_optimizers_do():
    text = repr(jk.SRPopup(make_network(), total_steps=5))
    assert text.startswith("SRPopup (") and "lr: 0.1" in text


def test_refuses_a_layer_that_keeps_nothing():
    model = make_network()
    model.conv.mask = torch.zeros_like(model.conv.mask)
    with pytest.raises(ValueError, match="mask of layer 'conv' must keep at least one weight, got none"):
        jk.SRPopup(model, total_steps=3)
    jk.SRPopup(model, total_steps=3, scope="global")
    for layer in jk.masked_layers(model).values():
        layer.mask = torch.zeros_like(layer.mask)
    with pytest.raises(ValueError, match="mask of the model must keep at least one weight, got none"):
        jk.SRPopup(model, total_steps=3, scope="global")
