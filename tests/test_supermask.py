"""Supermask (Zhou et al. 2019): its gradient, its draws, the K best it keeps, and searches with it."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_cli import PLAIN, invoke
from torch import nn
from torch.utils.data import TensorDataset

import jackpot_kernels as jk
from jackpot_kernels.data import digits
from jackpot_kernels.models import DigitsNet
from jackpot_kernels.search.folder import SearchFolder
from jackpot_kernels.search.loop import Search
from jackpot_kernels.search.settings import SearchSettings
from jackpot_kernels.search.supermask import Supermask

SETTINGS = SearchSettings(
    method="supermask", epochs=2, batch_size=32, lr=5.0, log_every=1, normalization="recalibrate"
)


def make_model(sparsity=0.7):
    torch.manual_seed(0)
    model = jk.convert(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)))
    jk.initialize(model, sparsity=sparsity, budget="uniform", keep_last_dense=False)
    return model


def batch(step):
    images, labels = digits()[0].tensors
    return images[32 * step :][:32], labels[32 * step :][:32]


def masks_of(model):
    return {name: layer.mask for name, layer in jk.masked_layers(model).items()}


def draw_and_step(model, optimizer, step):
    """Take a step and return the masks that it drew."""
    optimizer.zero_grad()
    optimizer.draw()
    drawn = masks_of(model)
    nn.functional.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
    optimizer.step()
    return drawn


def best(scores, k):
    """The first k by score, the lower index first among equals."""
    order = sorted(range(scores.size), key=lambda i: (-scores[i], i))
    mask = np.zeros(scores.size, bool)
    mask[order[:k]] = True
    return mask


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_descends_along_the_straight_through_gradient(scope):
    model = make_model()
    optimizer = Supermask(model, lr=3.0, momentum=0.9, weight_decay=0.01, scope=scope)
    layers = jk.masked_layers(model)
    logits = {name: layer.scores.detach().clone().double() for name, layer in layers.items()}
    momenta = {name: torch.zeros_like(s) for name, s in logits.items()}
    kept = {name: layer.num_kept for name, layer in layers.items()}
    for step in range(4):
        drawn = draw_and_step(model, optimizer, step)
        # The same loss of a plain network, whose weights are the products themselves.
        plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        with torch.no_grad():
            for name, layer in layers.items():
                plain.get_submodule(name).weight.copy_(layer.weight * drawn[name])
                plain.get_submodule(name).bias.copy_(layer.bias)
        nn.functional.cross_entropy(plain(batch(step)[0]), batch(step)[1]).backward()
        for name, layer in layers.items():
            slope = torch.exp(-logits[name]) / (1 + torch.exp(-logits[name])) ** 2
            gradient = plain.get_submodule(name).weight.grad * layer.weight * slope
            momenta[name] = 0.9 * momenta[name] + gradient + 0.01 * logits[name]
            logits[name] = logits[name] - 3.0 * momenta[name]
            torch.testing.assert_close(layer.scores.detach().double(), logits[name], atol=1e-5, rtol=1e-4)
        scores = [layer.scores.detach().reshape(-1).numpy() for layer in layers.values()]
        if scope == "global":
            wanted = best(np.concatenate(scores), sum(kept.values()))
        else:
            wanted = np.concatenate([best(s, k) for s, k in zip(scores, kept.values(), strict=True)])
        got = np.concatenate([layer.mask.reshape(-1).numpy() for layer in layers.values()])
        np.testing.assert_array_equal(got, wanted)


def test_draws_with_the_probabilities_of_the_logits():
    model = jk.convert(nn.Sequential(nn.Linear(100, 200), nn.Linear(200, 50)))
    jk.initialize(model, sparsity=0.5, keep_last_dense=True)
    layer, last = jk.masked_layers(model).values()
    logits = torch.linspace(-3, 3, 4).repeat_interleave(5000)
    layer.scores.data.copy_(logits.view_as(layer.scores))
    optimizer, drawn = Supermask(model), set()
    for step in range(3):
        optimizer._search["steps"] = step
        optimizer.draw()
        drawn.add(bytes(layer.mask.numpy()))
        shares = layer.mask.view(4, 5000).double().mean(1)
        for logit, share in zip((-3, -1, 1, 3), shares.tolist(), strict=True):
            p = 1 / (1 + math.exp(-logit))
            assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / 5000)
        assert bool(last.mask.all())  # its scores are frozen
    assert len(drawn) == 3
    other = Supermask(model, seed=1)
    other.draw()
    optimizer._search["steps"] = 0
    mask = layer.mask
    optimizer.draw()
    assert not torch.equal(layer.mask, mask)


def test_weights_keep_their_bits_and_masks_their_count():
    model = make_model()
    weights = {name: layer.weight.clone() for name, layer in jk.masked_layers(model).items()}
    kept = {name: layer.num_kept for name, layer in jk.masked_layers(model).items()}
    optimizer = Supermask(model, lr=50.0)
    entered = 0
    for step in range(6):
        before = masks_of(model)
        draw_and_step(model, optimizer, step)
        for name, layer in jk.masked_layers(model).items():
            assert torch.equal(layer.weight, weights[name]) and layer.num_kept == kept[name]
            stats = optimizer.stats()[name]
            assert stats.granted == stats.proposed == int((layer.mask & ~before[name]).sum())
            assert stats.threshold == layer.scores[layer.mask].min().item()
            entered += stats.granted
    assert entered > 0 and optimizer.steps == 6


def test_stats_of_the_global_scope_are_those_of_all():
    model = make_model()
    optimizer = Supermask(model, lr=50.0, scope="global")
    before = masks_of(model)
    draw_and_step(model, optimizer, 0)
    entered = sum(int((mask & ~before[name]).sum()) for name, mask in masks_of(model).items())
    lowest = min(layer.scores[layer.mask].min().item() for layer in jk.masked_layers(model).values())
    assert optimizer.stats() == {"global": (entered, entered, 0, lowest)}


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = make_model()
    optimizer = Supermask(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer.draw()
    for layer in jk.masked_layers(model).values():
        layer.scores.grad = torch.full_like(layer.scores, math.inf)
    optimizer.step()
    assert optimizer.skipped_steps == 1 and optimizer.steps == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not optimizer.state[jk.masked_layers(model)["0"].scores]["momentum_buffer"].any()


@pytest.fixture(scope="module")
def data():
    train, test = digits()
    return TensorDataset(*train[:160]), TensorDataset(*test[:64])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Dropout(0.1), DigitsNet(width=4))


def without_seconds(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.mark.parametrize("changes", [{}, {"scope": "global", "random_scores": True}])
@pytest.mark.parametrize("steps", [2, 5, 8])
def test_a_search_resumes_bit_for_bit(changes, steps, data):
    settings = replace(SETTINGS, **changes)
    whole = Search(network(), *data, settings)
    records = [whole.begin(), *whole.run()]
    parts = Search(network(), *data, settings)
    first = [parts.begin()]
    for record in parts.run():
        first.append(record)
        if record["step"] == steps:
            break
    state = parts.state_dict()
    other = Search(network(), *data, settings)
    other.load_state_dict(state)
    assert without_seconds([*first, *other.run()]) == without_seconds(records)
    same = zip(other.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert records[-1]["sparsity_masked"] == pytest.approx(records[0]["settings"]["sparsity"], abs=2e-3)
    assert sum(record.get("granted", 0) for record in records) > 0


def test_loading_copies_the_state_and_takes_the_masks_as_they_are():
    model, other = make_model(), make_model()
    optimizer, loaded = Supermask(model, lr=50.0), Supermask(other, lr=50.0)
    draw_and_step(model, optimizer, 0)
    state, before = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(state)
    for name, stats in loaded.stats().items():
        layer = other.get_submodule(name)
        assert (stats.granted, stats.threshold) == (0, layer.scores[layer.mask].min().item())
    draw_and_step(other, loaded, 1)
    for index, entry in before["state"].items():
        assert torch.equal(state["state"][index]["momentum_buffer"], entry["momentum_buffer"])


def test_the_loss_is_that_of_drawn_masks_and_the_score_that_of_the_best(data):
    search = Search(network(), *data, SETTINGS)
    search.begin()
    kept = []
    compute = search._compute

    def watched(inputs, labels):
        kept.append(jk.sparsity(search.model).masked)
        return compute(inputs, labels)

    search._compute = watched
    *_, last, _ = search.run()
    assert all(share < 0.5 for share in kept) and len(set(kept)) > 5
    assert jk.sparsity(search.model).masked == pytest.approx(0.9, abs=2e-3)
    images, labels = data[1].tensors
    accuracy = (search.model.eval()(images).argmax(1) == labels).double().mean().item()
    assert accuracy == last["test_accuracy"]


def test_refuses_the_state_of_another_search():
    optimizer = Supermask(make_model())
    with pytest.raises(ValueError, match="num_kept of state_dict must be"):
        optimizer.load_state_dict(Supermask(make_model(0.5)).state_dict())
    with pytest.raises(ValueError, match=r"state_dict must come from Supermask\.state_dict"):
        optimizer.load_state_dict(jk.SRPopup(make_model(), total_steps=1).state_dict())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "lottery"}, "method must be one of sr-popup, supermask, got 'lottery'"),
        ({"schedule": "single"}, "schedule must be left at quartic with method 'supermask', got 'single'"),
        ({"pairs": "random"}, "pairs must be left at best with method 'supermask', got 'random'"),
        ({"compat": "authors"}, "compat must be left at None with method 'supermask', got 'authors'"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(SETTINGS, **changes)


def test_bad_arguments():
    with pytest.raises(ValueError, match="lr must be finite in float32 and at least 0, got -1"):
        Supermask(make_model(), lr=-1)
    with pytest.raises(TypeError, match="seed must be an int, got float"):
        Supermask(make_model(), seed=0.5)
    with pytest.raises(ValueError, match="scope must be one of layer, global, got 'block'"):
        Supermask(make_model(), scope="block")
    with pytest.raises(ValueError, match="model must hold masked layers to search"):
        Supermask(nn.Linear(2, 2))


def test_the_command_line_takes_the_method(monkeypatch, tmp_path):
    monkeypatch.setattr("jackpot_kernels.report.write_search_report", lambda *_, **__: "report.html")
    chosen = ["--method", "supermask", "--lr", "5", "--epochs", "1", "--batch-size", "64"]
    result = invoke("search", "--output", tmp_path / "out", *PLAIN, *chosen, "--device", "cpu")
    assert result.exit_code == 0, result.output
    start, *_, end = SearchFolder(tmp_path / "out").records()
    assert start["settings"]["method"] == "supermask"
    assert end["sparsity_masked"] == pytest.approx(0.9, abs=2e-3)
    model = DigitsNet(width=4)
    assert (
        jk.load_jackpot(tmp_path / "out/jackpot.safetensors", model).sparsity.masked == end["sparsity_masked"]
    )
