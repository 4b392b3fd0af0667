"""Criteria against closed forms and finite differences; the model they look at stays as it was."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from jackpot_kernels import criteria
from jackpot_kernels.convert import convert, masked_layers

LOSS = nn.functional.mse_loss


def linear_problem(batches=3, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(4, 5)).astype(np.float32)
    model = nn.Linear(5, 4, bias=False)
    model.weight.data = torch.tensor(weight)
    data = [(rng.normal(size=(6, 5)), rng.normal(size=(6, 4))) for _ in range(batches)]
    return convert(model), weight.astype(np.float64), data


def as_tensors(data):
    return [tuple(torch.tensor(part, dtype=torch.float32) for part in pair) for pair in data]


def smooth_network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3), nn.Tanh()).to(dtype)


def smooth_batches(count=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype)  # noqa: E731
    return [(draw(5, 2, 6), draw(5, 3)) for _ in range(count)]


def test_magnitude_is_the_absolute_value_in_logical_order():
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(4, 2))).to(memory_format=torch.channels_last)
    importance = criteria.magnitude(masked_layers(model))
    assert list(importance) == ["0", "1"]
    for name, layer in masked_layers(model).items():
        assert importance[name].is_contiguous() and importance[name].dtype == torch.float32
        np.testing.assert_array_equal(importance[name].numpy(), np.abs(layer.weight.detach().numpy()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_magnitude_of_low_precision_weights_is_exact(dtype):
    model = convert(nn.Linear(30, 20).to(dtype))
    assert torch.equal(criteria.magnitude(masked_layers(model))[""], model.weight.detach().float().abs())


def test_snip_is_weight_times_mean_gradient():
    model, weight, data = linear_problem()
    gradient = np.mean([2 * (x @ weight.T - y).T @ x / y.size for x, y in data], axis=0)
    importance = criteria.snip(model, LOSS, as_tensors(data))
    np.testing.assert_allclose(importance[""].numpy(), np.abs(weight * gradient), rtol=1e-4, atol=1e-6)


def test_grasp_is_weight_times_hessian_gradient_product():
    model, weight, data = linear_problem()
    gradient = np.mean([2 * (x @ weight.T - y).T @ x / y.size for x, y in data], axis=0)
    product = np.mean([2 * gradient @ x.T @ x / y.size for x, y in data], axis=0)
    importance = criteria.grasp(model, LOSS, iter(as_tensors(data)))
    np.testing.assert_allclose(importance[""].numpy(), weight * product, rtol=1e-4, atol=1e-6)


def test_grasp_ranks_first_what_the_gradient_norm_needs_most():
    def squared_norm(model):
        loss = sum(LOSS(model(x), y) for x, y in batches) / len(batches)
        weights = [model[0].weight, model[3].weight]
        return sum(float((g**2).sum()) for g in torch.autograd.grad(loss, weights))

    plain, batches, step = smooth_network(), smooth_batches(), 1e-5
    importance = criteria.grasp(convert(copy.deepcopy(plain)), LOSS, batches)
    for layer in (0, 3):
        weight = plain[layer].weight.data.view(-1)
        lost = []
        for i, value in enumerate(weight.tolist()):
            weight[i] = value * (1 - step)
            smaller = squared_norm(plain)
            weight[i] = value * (1 + step)
            lost.append((squared_norm(plain) - smaller) / (4 * step))
            weight[i] = value
        np.testing.assert_allclose(importance[str(layer)].numpy().ravel(), lost, rtol=1e-3, atol=1e-7)


def test_a_loss_without_curvature_gives_zero_importance():
    model, _, data = linear_problem()
    importance = criteria.grasp(model, lambda output, y: (output * y).mean(), as_tensors(data))
    assert not importance[""].any()


def test_random_repeats_with_its_generator_and_is_uniform():
    layers = masked_layers(convert(nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 100))))
    first, second = (criteria.random(layers, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in layers)
    assert not torch.equal(first["0"].flatten(), first["1"].flatten())
    assert abs(float(first["0"].mean()) - 0.5) < 0.02
    torch.manual_seed(3)
    assert torch.equal(criteria.random(layers)["1"], first["1"])


@pytest.mark.parametrize("criterion", [criteria.snip, criteria.grasp])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_the_whole_network_and_leave_it_as_it_was(criterion, training):
    model = convert(
        nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 3))
    ).train(training)
    model[2].train(not training)
    batches = smooth_batches(dtype=torch.float32)
    whole = criterion(model, LOSS, batches)
    for layer in masked_layers(model).values():
        mask = layer.mask
        mask.view(-1)[::2] = False
        layer.mask = mask
    model[4].weight.requires_grad_()
    LOSS(model(batches[0][0]), batches[0][1]).backward()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    flags = {
        n: (p.requires_grad, p.grad, p.grad is not None and p.grad.clone())
        for n, p in model.named_parameters()
    }
    rng = torch.get_rng_state()
    again = criterion(model, LOSS, batches)
    if not training:
        assert all(torch.equal(whole[n], again[n]) for n in whole)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(rng, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        flag, grad, values = flags[name]
        assert parameter.requires_grad == flag and parameter.grad is grad
        assert grad is None or torch.equal(grad, values)


def test_a_layer_that_the_loss_does_not_reach_has_zero_importance():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, x):
            return self.used(x).tanh()

    batches = as_tensors(linear_problem()[2])
    for criterion in (criteria.snip, criteria.grasp):
        importance = criterion(convert(Half()), LOSS, batches)
        assert importance["used"].any() and not importance["unused"].any()


@pytest.mark.parametrize("criterion", [criteria.snip, criteria.grasp])
def test_no_batch_and_no_loss_are_refused(criterion):
    with pytest.raises(ValueError, match=r"^batches must hold at least one pair \(x, y\), got none$"):
        criterion(convert(nn.Linear(2, 2)), LOSS, [])
    with pytest.raises(TypeError, match=r"^batches must be pairs \(x, y\), got int$"):
        criterion(convert(nn.Linear(2, 2)), LOSS, 5)
    with pytest.raises(TypeError, match=r"^loss_fn must be a function, got str$"):
        criterion(convert(nn.Linear(2, 2)), "cross_entropy", [])


def test_given_tensors_are_checked_and_copied():
    layers = masked_layers(convert(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))))
    good = {"1": torch.rand(3, 2, dtype=torch.float64), "0": torch.rand(2, 3)}
    importance = criteria.given(layers, good)
    assert list(importance) == ["0", "1"] and importance["1"].dtype == torch.float32
    assert importance["0"].data_ptr() != good["0"].data_ptr()
    for wrong, error, message in [
        ({**good, "2": good["0"]}, ValueError, "criterion must name masked layers, got '2'"),
        ({"1": good["1"]}, ValueError, "criterion must name every masked layer, got none for '0'"),
        ({**good, "0": good["1"]}, ValueError, "criterion of '0' must have shape (2, 3), got (3, 2)"),
        (
            {**good, "0": good["0"].int()},
            TypeError,
            "criterion of '0' must be a floating-point tensor, got torch.int32",
        ),
        ({**good, "0": [1.0]}, TypeError, "criterion of '0' must be a floating-point tensor, got list"),
    ]:
        with pytest.raises(error) as raised:
            criteria.given(layers, wrong)
        assert str(raised.value) == message
