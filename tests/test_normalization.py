"""Normalisation statistics: estimated again exactly, or held still; everything else stays as it was."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from jackpot_kernels.normalization import freeze_statistics, recalibrate


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm1d(3, momentum=0.3), nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.LayerNorm(4)
    )


def batches(count=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 3, generator=generator) * i + i, None) for i in range(1, count + 1)]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_statistics_are_the_mean_over_the_batches():
    model, data = network().train(), batches()
    recalibrate(model, data)
    means = np.mean([x.numpy().mean(0) for x, _ in data], axis=0)
    variances = np.mean([x.numpy().var(0, ddof=1) for x, _ in data], axis=0)
    np.testing.assert_allclose(model[0].running_mean.numpy(), means, rtol=1e-5)
    np.testing.assert_allclose(model[0].running_var.numpy(), variances, rtol=1e-5)
    # The second layer sees what the first one makes of each batch, without dropout.
    hidden = [
        model[1](nn.functional.batch_norm(x, None, None, model[0].weight, model[0].bias, training=True))
        for x, _ in data
    ]
    torch.testing.assert_close(model[3].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))


def test_nothing_but_the_statistics_changes():
    model = network().train()
    model[2].eval()
    before, modes = state(model), [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    recalibrate(model, batches())
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed == {
        f"{i}.{b}" for i in (0, 3) for b in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert [m.training for m in model.modules()] == modes
    assert (model[0].momentum, model[3].momentum) == (0.3, 0.1)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(rng, torch.get_rng_state())


def test_inputs_alone_and_a_generator_of_batches_do_as_well():
    one, other = network(), network()
    recalibrate(one, batches())
    recalibrate(other, (x for x, _ in batches()))
    assert all(torch.equal(a, b) for a, b in zip(state(one).values(), state(other).values(), strict=True))


def broken():
    yield from batches(2)
    raise RuntimeError("disk gone")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "batches must hold at least one batch, got none"),
        (broken(), RuntimeError, "disk gone"),
    ],
)
def test_a_failure_puts_everything_back(data, error, message):
    model = network().train()
    before = state(model)
    with pytest.raises(error, match=message):
        recalibrate(model, data)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert all(m.training for m in model.modules()) and model[0].momentum == 0.3


@pytest.mark.parametrize("function", [freeze_statistics, lambda model: recalibrate(model, batches())])
@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)])
def test_a_model_without_statistics_is_refused(function, model):
    with pytest.raises(
        ValueError, match=r"^model must hold batch normalisation with running statistics, got "
    ):
        function(model)
    with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got str$"):
        function("a model")


@pytest.mark.parametrize("through", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_frozen_statistics_survive_train(through):
    original = network()
    recalibrate(original, batches())
    freeze_statistics(original)
    model = through(original).train()
    before = state(model)
    assert model.training and model[2].training and not model[0].training and not model[3].training
    x = batches(seed=9)[0][0]
    model(x).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert model[0].weight.grad is not None
    expected = (x - model[0].running_mean) / (model[0].running_var + 1e-5).sqrt()
    torch.testing.assert_close(model[0](x), expected)


def test_a_frozen_copy_is_its_own_and_freezing_can_be_undone():
    model = network()
    freeze_statistics(model)
    other = copy.deepcopy(model)
    freeze_statistics(model, frozen=False)
    assert model.train()[0].training and not other.train()[0].training
    assert other[0].train() is other[0]


def test_frozen_layers_can_be_recalibrated():
    model, free = network(), network()
    freeze_statistics(model)
    recalibrate(model.train(), batches())
    recalibrate(free, batches())
    assert torch.equal(model[3].running_mean, free[3].running_mean)
    assert not model.train()[0].training
