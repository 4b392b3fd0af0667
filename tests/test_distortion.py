"""Distortion where it has a closed form: a loss that is quadratic in the weights under the mask."""

import numpy as np
import pytest
import torch
from torch import nn

import jackpot_kernels as jk
from jackpot_kernels.data import digits
from jackpot_kernels.models import DigitsNet
from jackpot_kernels.search.distortion import Distortion, agreement, measure_distortion

INPUTS, OUTPUTS, SAMPLES = 12, 3, 40


def half_square(outputs, targets):
    return (outputs - targets).square().sum(1).mean() / 2


def linear_model():
    torch.manual_seed(0)
    model = jk.convert(nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False)))
    jk.initialize(model, sparsity=0.5, keep_last_dense=False)
    return model


def linear_batches(count=1):
    return [(torch.randn(SAMPLES, INPUTS), torch.randn(SAMPLES, OUTPUTS)) for _ in range(count)]


def closed_form(weight, mask, leaving, entering, x, y):
    """Return g'd and g'd + d'Hd/2 for ``E |V x - y|^2 / 2``, V being the weight under the mask."""
    v = weight * mask
    d = np.zeros_like(v)
    d.reshape(-1)[leaving] = -weight.reshape(-1)[leaving]
    d.reshape(-1)[entering] = weight.reshape(-1)[entering]
    gradient = (x @ v.T - y).T @ x / len(x)
    hessian = x.T @ x / len(x)  # of each output's row
    expected = (gradient * d).sum()
    return expected, expected + sum(row @ hessian @ row for row in d) / 2


def proposed(weight, mask, scores, x, y, lr):
    """The pairs that SR-popup proposes, widest gap first: sorted by hand."""
    gradient = (x @ (weight * mask).T - y).T @ x / len(x) * weight
    new = (scores - lr * gradient).reshape(-1)
    order = sorted(range(new.size), key=lambda i: (-new[i], i))
    k = int(mask.sum())
    entering = [i for i in order[:k] if not mask.reshape(-1)[i]]
    leaving = [i for i in reversed(order[k:]) if mask.reshape(-1)[i]]
    return leaving, entering


def test_best_swaps_of_a_quadratic_loss():
    scores = torch.rand(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1))
    model, batches = linear_model(), linear_batches(3)
    layer = model[0]
    # Kept weights rank higher by so little that a step makes some of them change places.
    layer.scores.data.copy_(0.1 * scores + 0.1 * layer.mask)
    records = measure_distortion(model, batches, (1, 2, 4), loss_fn=half_square, lr=3.0)
    best = [record for record in records if record.kind == "best"]
    weight, mask = layer.weight.double().numpy(), layer.mask.numpy()
    compared = 0
    for x, y in batches:
        x, y = x.double().numpy(), y.double().numpy()
        leaving, entering = proposed(weight, mask, layer.scores.detach().double().numpy(), x, y, 3.0)
        for q in (1, 2, 4):
            if q > len(entering):
                continue
            expected, measured = closed_form(weight, mask, leaving[:q], entering[:q], x, y)
            record = best[compared]
            assert record.q == q
            assert record.expected == pytest.approx(expected, rel=1e-5)
            assert record.measured == pytest.approx(measured, rel=1e-5)
            assert record.epsilon == pytest.approx(measured - expected, rel=1e-4)
            compared += 1
    assert compared == len(best) > 4


def test_random_swaps_of_a_quadratic_loss():
    """Every draw is one of the pairs there are, and all draws of one batch share loss and gradient."""
    model, ((x, y),) = linear_model(), linear_batches()
    records = measure_distortion(model, [(x, y)], (1,), loss_fn=half_square, draws=300)
    weight, mask = model[0].weight.double().numpy(), model[0].mask.numpy()
    x, y = x.double().numpy(), y.double().numpy()
    pairs = [
        closed_form(weight, mask, [i], [j], x, y) for i in np.flatnonzero(mask) for j in np.flatnonzero(~mask)
    ]
    drawn = [(record.expected, record.measured) for record in records if record.kind == "random"]
    distances = np.abs(np.array(drawn)[:, None] - np.array(pairs)).max(-1)
    assert distances.min(1).max() < 1e-6
    assert len(set(distances.argmin(1))) > 150  # of 324 pairs


def test_quantities_draws_and_batches():
    model = linear_model()
    records = measure_distortion(model, linear_batches(2), (1, 4, 18), loss_fn=half_square, draws=3)
    assert [r.q for r in records if r.kind == "random"] == 2 * [1, 1, 1, 4, 4, 4, 18, 18, 18]
    assert all(r.epsilon == r.measured - r.expected for r in records)
    # All 18 pairs at once have one outcome only.
    assert len({round(r.measured, 9) for r in records if (r.kind, r.q) == ("random", 18)}) == 2
    again = measure_distortion(model, linear_batches(0), (1,), loss_fn=half_square)
    assert again == []


def test_seed_decides():
    batches = linear_batches()
    first, same, other = (
        measure_distortion(linear_model(), batches, (2,), loss_fn=half_square, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == same != other


def test_a_loss_that_is_linear_has_no_distortion():
    records = measure_distortion(
        linear_model(), linear_batches(), (1, 8), loss_fn=lambda outputs, _: outputs.mean(), draws=4
    )
    assert max(abs(record.epsilon) for record in records) < 1e-7
    assert set(agreement(records).values()) == {1.0}


@pytest.fixture(scope="module")
def searched():
    """A network in the middle of a search, where scores propose swaps."""
    torch.manual_seed(0)
    model = jk.convert(DigitsNet(width=4))
    jk.initialize(model, sparsity=0.7, budget="uniform")
    optimizer = jk.SRPopup(model, lr=1.0, total_steps=20)
    images, labels = digits()[0].tensors
    for step in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[64 * step :][:64]), labels[64 * step :][:64]).backward()
        optimizer.step()
    return model.train()


@pytest.mark.parametrize("batch_statistics", [True, False])
def test_the_loss_is_that_of_the_swapped_network(batch_statistics):
    """With half of the weights kept, all swaps of a layer at once turn its mask round."""
    torch.manual_seed(0)
    model = jk.convert(DigitsNet(width=4))
    jk.initialize(model, sparsity=0.5, budget="uniform")
    layers = jk.masked_layers(model)
    one = layers["features.1.0"]
    for layer in layers.values():
        layer.scores.requires_grad_(layer is one)
    images, labels = (tensor[:100] for tensor in digits()[0].tensors)
    q = one.num_kept
    assert 2 * q == one.weight.numel()
    (record, *_) = measure_distortion(model, [(images, labels)], (q,), batch_statistics=batch_statistics)

    def loss(mask):
        plain = DigitsNet(width=4).double().train(batch_statistics)
        masks = {f"{name}.weight": mask if layer is one else layer.mask for name, layer in layers.items()}
        state = model.state_dict()
        plain.load_state_dict(
            {k: state[k] * masks[k] if k in masks else state[k] for k in plain.state_dict()}
        )
        return nn.functional.cross_entropy(plain(images.double()), labels).item()

    assert record.measured == pytest.approx(loss(~one.mask) - loss(one.mask), rel=1e-9)


def test_the_model_stays_as_it_is_to_the_bit(searched):
    before = {name: tensor.clone() for name, tensor in searched.state_dict().items()}
    modes = [module.training for module in searched.modules()]
    versions = [tensor._version for tensor in searched.state_dict().values()]
    images, labels = (tensor[:64] for tensor in digits()[0].tensors)
    rng = torch.get_rng_state()
    records = measure_distortion(searched, [(images, labels)], (1, 2, 4), draws=2)
    assert {record.kind for record in records} == {"random", "best"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in searched.state_dict().items())
    assert [module.training for module in searched.modules()] == modes
    assert [tensor._version for tensor in searched.state_dict().values()] == versions
    assert torch.equal(torch.get_rng_state(), rng)


def test_more_swaps_distort_more(searched):
    images, labels = (tensor[:128] for tensor in digits()[0].tensors)
    records = measure_distortion(searched, [(images, labels)], (1, 64), draws=20)
    spread = {q: np.std([r.epsilon for r in records if (r.kind, r.q) == ("random", q)]) for q in (1, 64)}
    assert spread[64] > 2 * spread[1]


def test_agreement_counts_signs():
    made = [(1, "best", -1.0, -2.0), (1, "best", -1.0, 3.0), (2, "best", 1.0, 0.5), (1, "random", 0.0, 0.0)]
    made += [(1, "random", 0.0, 1.0), (3, "random", -1.0, 0.0)]
    records = [Distortion(*r, epsilon=0.0) for r in made]
    shares = {("best", 1): 0.5, ("best", 2): 1.0, ("random", 1): 0.5, ("random", 3): 0.0}
    assert agreement(records) == shares


def test_bad_input():
    with pytest.raises(ValueError, match=r"quantities must be in \[1, 18\], got 19"):
        measure_distortion(linear_model(), linear_batches(), (1, 19), loss_fn=half_square)
    with pytest.raises(ValueError, match=r"quantities must be in \[1, 18\], got 0"):
        measure_distortion(linear_model(), linear_batches(), (0,), loss_fn=half_square)
    with pytest.raises(ValueError, match="model must hold masked layers to search"):
        measure_distortion(nn.Linear(2, 2), linear_batches(), (1,))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        measure_distortion(5, linear_batches(), (1,))
