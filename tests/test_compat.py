"""compat="authors" against a loop written from a description of the released code: rate 1, or nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import jackpot_kernels as jk
from jackpot_kernels.data import digits
from jackpot_kernels.models import DigitsNet
from jackpot_kernels.search.loop import Search
from jackpot_kernels.search.settings import SearchSettings

STEPS = 12
LR = 0.25


class Layer:
    """A layer as the released code treats it, in NumPy."""

    def __init__(self, scores, mask):
        self.scores, self.mask, self.skipped, self.swapped = scores.copy(), mask.copy(), 0, 0

    def update(self, grad):
        self.scores = self.scores - LR * grad


def swap_where_counts_agree(layers):
    """Swap all candidates, or none when there are more on one side than on the other."""
    scores = np.concatenate([layer.scores for layer in layers])
    mask = np.concatenate([layer.mask for layer in layers])
    limit = np.sort(scores)[(~mask).sum() - 1]
    leaving, entering = mask & (scores <= limit), ~mask & (scores > limit)
    agree = leaving.sum() == entering.sum()
    if agree:
        mask = mask & ~leaving | entering
    start = 0
    for layer in layers:
        layer.skipped += not agree
        layer.swapped += int(entering.sum()) if agree else 0
        layer.mask = mask[start : start + len(layer.mask)]
        start += len(layer.mask)


def make_model(channels_last=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(12, 7), nn.Linear(40, 33))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    jk.convert(model)
    jk.initialize(model, sparsity=0.6, budget="uniform", keep_last_dense=False, eta=0.5)
    return model


def grid(rng, size, finest):
    """Draw multiples of 1 / finest, of which all sums are exact and many are equal."""
    return rng.integers(-2 * finest, 2 * finest + 1, size).astype(np.float32) / finest


def give(model, rng, grads=None):
    """Set the gradient of every layer, and return them flat."""
    grads = grads or [grid(rng, layer.weight.numel(), 64) for layer in jk.masked_layers(model).values()]
    for layer, grad in zip(jk.masked_layers(model).values(), grads, strict=True):
        layer.scores.grad = torch.from_numpy(grad).view(layer.weight.shape)
    return grads


def flat(tensor):
    return tensor.detach().reshape(-1).numpy()


def make_oracles(model):
    return [Layer(flat(layer.scores), flat(layer.mask)) for layer in jk.masked_layers(model).values()]


def assert_same(model, oracles):
    for layer, wanted in zip(jk.masked_layers(model).values(), oracles, strict=True):
        np.testing.assert_array_equal(flat(layer.scores), wanted.scores)
        np.testing.assert_array_equal(flat(layer.mask), wanted.mask)
        patched = layer.patchable_effective_weight
        assert patched is None or torch.equal(patched, layer.weight * layer.mask)
        assert torch.equal(layer.effective_weight(), layer.weight * layer.mask)


def make_optimizer(model, **options):
    plain = {"lr": LR, "momentum": 0.0, "weight_decay": 0.0, "total_steps": STEPS, "compat": "authors"}
    return jk.SRPopup(model, **(plain | options))


@pytest.mark.parametrize("channels_last", [False, True])
def test_swaps_all_or_nothing(channels_last):
    model, rng = make_model(channels_last), np.random.default_rng(0)
    oracles, optimizer = make_oracles(model), make_optimizer(model)
    for _ in range(STEPS):
        before = [(o.skipped, o.swapped) for o in oracles]
        for oracle, grad in zip(oracles, give(model, rng), strict=True):
            oracle.update(grad)
            swap_where_counts_agree([oracle])
        optimizer.step()
        assert_same(model, oracles)
        for stats, oracle, (skipped, swapped) in zip(
            optimizer.stats().values(), oracles, before, strict=True
        ):
            assert stats.granted == oracle.swapped - swapped
            assert stats.skipped == stats.proposed - stats.granted
            assert oracle.skipped > skipped or stats.skipped == 0
    # Both happened, or this shows nothing.
    assert sum(o.skipped for o in oracles) > 3 and sum(o.swapped for o in oracles) > 3


def test_the_global_scope_is_one_layer():
    model, rng = make_model(), np.random.default_rng(1)
    oracles, optimizer = make_oracles(model), make_optimizer(model, scope="global")
    for _ in range(STEPS):
        grads = [grid(rng, layer.weight.numel(), 256) for layer in jk.masked_layers(model).values()]
        for oracle, grad in zip(oracles, give(model, rng, grads), strict=True):
            oracle.update(grad)
        swap_where_counts_agree(oracles)
        optimizer.step()
        assert_same(model, oracles)
    assert oracles[0].skipped > 1 and oracles[0].swapped > 1


def test_without_ties_it_is_edge_popup():
    ours, plain = make_model(), make_model()
    optimizer, wanted = make_optimizer(ours), make_optimizer(plain, compat=None, schedule="constant")
    rng = np.random.default_rng(2)
    for _ in range(STEPS):
        sizes = [layer.weight.numel() for layer in jk.masked_layers(ours).values()]
        grads = [rng.standard_normal(n).astype(np.float32) for n in sizes]
        for model, search in ((ours, optimizer), (plain, wanted)):
            give(model, rng, grads)
            search.step()
        assert optimizer.stats() == wanted.stats()
    assert all(map(torch.equal, ours.state_dict().values(), plain.state_dict().values()))


def test_the_restriction_never_acts():
    """Not even at the last step, where that of the paper is 0."""
    model, rng = make_model(), np.random.default_rng(3)
    optimizer = make_optimizer(model, total_steps=1, schedule="quartic")
    sizes = [layer.weight.numel() for layer in jk.masked_layers(model).values()]
    give(model, rng, [8 * rng.standard_normal(n).astype(np.float32) for n in sizes])
    optimizer.step()
    assert all(stats.granted == stats.proposed > 0 for stats in optimizer.stats().values())


def test_a_step_that_is_not_finite_swaps_nothing():
    model, rng = make_model(), np.random.default_rng(4)
    optimizer = make_optimizer(model)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    grads = give(model, rng)
    grads[1][3] = np.nan
    give(model, rng, grads)
    optimizer.step()
    assert optimizer.skipped_steps == 1 and optimizer.steps == 0
    assert all(map(torch.equal, before, model.state_dict().values()))


def test_resumes_bit_for_bit():
    whole, parts, rng = make_model(), make_model(), np.random.default_rng(5)
    optimizers = [make_optimizer(model) for model in (whole, parts)]
    for t in range(STEPS):
        if t == 5:
            state = parts.state_dict(), optimizers[1].state_dict()
            parts = make_model()
            parts.load_state_dict(state[0])
            # An optimizer without the option takes it from the state, as it does a schedule.
            optimizers[1] = make_optimizer(parts, compat=None)
            optimizers[1].load_state_dict(state[1])
        grads = give(whole, rng)
        give(parts, rng, grads)
        for optimizer in optimizers:
            optimizer.step()
    assert all(map(torch.equal, whole.state_dict().values(), parts.state_dict().values()))


def test_a_search_takes_the_option():
    train, test = digits()
    data = TensorDataset(*train[:160]), TensorDataset(*test[:64])
    settings = SearchSettings(epochs=2, batch_size=32, compat="authors", log_every=1, eta=0.999)

    def network():
        torch.manual_seed(0)
        return DigitsNet(width=4)

    search = Search(network(), *data, settings)
    search.begin()
    records = list(search.run())
    steps = [record for record in records if record["kind"] == "step"]
    assert sum(record["granted"] for record in steps) > 0
    parts = Search(network(), *data, settings)
    parts.begin()
    for record in parts.run():
        if record["step"] == 7:
            break
    other = Search(network(), *data, settings)
    other.load_state_dict(parts.state_dict())
    assert list(other.run())[-1]["layers"] == records[-1]["layers"]
    same = zip(other.model.state_dict().values(), search.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_bad_choices():
    with pytest.raises(ValueError, match="compat must be one of authors, got 'paper'"):
        make_optimizer(make_model(), compat="paper")
    with pytest.raises(ValueError, match=r"final_sparsity must be None with compat 'authors', got 0\.9"):
        make_optimizer(make_model(), final_sparsity=0.9)
    with pytest.raises(ValueError, match="compat must be one of authors, got 'paper'"):
        SearchSettings(compat="paper")
    with pytest.raises(ValueError, match="schedule must be left at quartic with compat, got 'single'"):
        replace(SearchSettings(), compat="authors", schedule="single")
