"""The start of a search: exact masks, exact counts, two-valued scores, untouched weights."""

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from jackpot_kernels.convert import convert, masked_layers, sparsity
from jackpot_kernels.initialize import initialize


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 7, 3, groups=1),
        nn.Flatten(),
        nn.Linear(28, 5),
    )
    for i in (0, 2, 4):
        nn.init.normal_(model[i].weight)
    return convert(model)


def tied(model):
    """Round the weights so coarsely that most importances tie."""
    for layer in masked_layers(model).values():
        layer.weight.data = (layer.weight.data * 2).round() / 2
    return model


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def flat(model, names):
    return np.concatenate([np.abs(masked_layers(model)[n].weight.detach().numpy()).ravel() for n in names])


def first(values, k):
    mask = np.zeros(values.size, bool)
    mask[np.argsort(-values, kind="stable")[:k]] = True
    return mask


def kept(numel, share):
    return numel - math.ceil(Fraction(str(share)) * numel)


@pytest.mark.parametrize("make", [network, lambda: tied(network())])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("keep_last_dense", [True, False])
def test_global_magnitude_is_one_selection(make, share, keep_last_dense):
    model = make()
    weights = {n: layer.weight.detach().clone() for n, layer in masked_layers(model).items()}
    initialize(model, share, keep_last_dense=keep_last_dense)
    names = ["0", "2"] if keep_last_dense else ["0", "2", "4"]
    values = flat(model, names)
    expected = first(values, kept(values.size, share))
    masks = {n: layer.mask.numpy() for n, layer in masked_layers(model).items()}
    np.testing.assert_array_equal(np.concatenate([masks[n].ravel() for n in names]), expected)
    assert masks["4"].all() == keep_last_dense
    assert sparsity(model).masked == pytest.approx(1 - kept(values.size, share) / values.size)
    for name, layer in masked_layers(model).items():
        assert torch.equal(layer.weight.view(torch.int32), weights[name].view(torch.int32))
        expected_scores = np.where(masks[name], np.float32(1), np.float32(0.99))
        np.testing.assert_array_equal(layer.scores.detach().numpy(), expected_scores)
        assert layer.scores.requires_grad == (name in names) and not layer.weight.requires_grad


def test_the_budget_of_magnitude_is_that_of_its_global_selection():
    model, like = network(), network()
    initialize(like, 0.8, keep_last_dense=False)
    generator = torch.Generator().manual_seed(1)
    initialize(model, 0.8, "random", "magnitude", keep_last_dense=False, generator=generator)
    pairs = list(zip(masked_layers(model).values(), masked_layers(like).values(), strict=True))
    assert [ours.num_kept for ours, _ in pairs] == [theirs.num_kept for _, theirs in pairs]
    assert not any(torch.equal(ours.mask_words, theirs.mask_words) for ours, theirs in pairs)


@pytest.mark.parametrize("make", [network, lambda: tied(network())])
@pytest.mark.parametrize("budget", ["uniform", "erk", {"0": 3, "2": 504, "4": 1}])
def test_each_layer_keeps_its_first_by_magnitude(make, budget):
    model = make()
    initialize(model, 0.8, budget=budget, keep_last_dense=False)
    for name, layer in masked_layers(model).items():
        values = np.abs(layer.weight.detach().numpy()).ravel()
        if isinstance(budget, dict):
            assert layer.num_kept == budget[name]
        if budget == "uniform":
            assert layer.num_kept == kept(values.size, 0.8)
        np.testing.assert_array_equal(layer.mask.numpy().ravel(), first(values, layer.num_kept))
    if budget == "erk":
        total = sum(layer.weight.numel() for layer in masked_layers(model).values())
        assert sum(layer.num_kept for layer in masked_layers(model).values()) == kept(total, 0.8)


def test_the_memory_format_does_not_matter():
    model, other = tied(network()), tied(network()).to(memory_format=torch.channels_last)
    initialize(model, 0.7)
    initialize(other, 0.7)
    for a, b in zip(masked_layers(model).values(), masked_layers(other).values(), strict=True):
        assert torch.equal(a.mask, b.mask) and torch.equal(a.scores, b.scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = network().to(dtype)
    initialize(model, 0.9)
    values = np.concatenate(
        [masked_layers(model)[n].weight.detach().float().abs().numpy().ravel() for n in ("0", "2")]
    )
    got = np.concatenate([masked_layers(model)[n].mask.numpy().ravel() for n in ("0", "2")])
    np.testing.assert_array_equal(got, first(values, kept(values.size, 0.9)))
    assert all(layer.scores.dtype == torch.float32 for layer in masked_layers(model).values())


def test_a_second_call_and_a_copy_start_again():
    model, fresh = network(), network()
    initialize(model, 0.95, keep_last_dense=True)
    other = copy.deepcopy(model)
    other[0].scores.grad = torch.ones_like(other[0].scores)
    before = snapshot(model)
    initialize(other, 0.5, keep_last_dense=False, eta=0.5)
    initialize(fresh, 0.5, keep_last_dense=False, eta=0.5)
    assert all(torch.equal(v, snapshot(fresh)[k]) for k, v in snapshot(other).items())
    assert all(torch.equal(v, before[k]) for k, v in snapshot(model).items())
    assert other[0].scores.grad is None and other[4].scores.requires_grad


def test_a_given_importance_decides_and_the_last_layer_may_be_missing():
    model = network()
    generator = torch.Generator().manual_seed(1)
    tensors = {
        n: torch.randint(3, model.get_submodule(n).weight.shape, generator=generator).float() for n in "02"
    }
    initialize(model, 0.6, criterion=tensors)
    values = np.concatenate([tensors[n].numpy().ravel() for n in "02"])
    got = np.concatenate([masked_layers(model)[n].mask.numpy().ravel() for n in "02"])
    np.testing.assert_array_equal(got, first(values, kept(values.size, 0.6)))
    initialize(model, 0.6, criterion={**tensors, "4": torch.ones(5, 28)})
    assert model[4].mask.all()
    with pytest.raises(ValueError, match="got none for '4'"):
        initialize(model, 0.6, criterion=tensors, keep_last_dense=False)


@pytest.mark.parametrize("criterion", ["snip", "grasp"])
def test_gradient_criteria_do_not_depend_on_the_present_mask(criterion):
    model = network()
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(4, 3, 6, 6, generator=generator), torch.arange(4))]
    options = {"loss_fn": nn.functional.cross_entropy, "batches": batches}
    initialize(model, 0.8, criterion, **options)
    first_masks = {n: layer.mask for n, layer in masked_layers(model).items()}
    initialize(model, 0.8, criterion, **options)
    assert all(torch.equal(layer.mask, first_masks[n]) for n, layer in masked_layers(model).items())
    initialize(model, 0.8)
    assert any(not torch.equal(layer.mask, first_masks[n]) for n, layer in masked_layers(model).items())


def test_random_repeats_with_a_seed():
    model, other = network(), network()
    initialize(model, 0.9, "random", generator=torch.Generator().manual_seed(5))
    initialize(other, 0.9, "random", generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(v, snapshot(other)[k]) for k, v in snapshot(model).items())


def test_a_layer_keeps_its_best_weight_with_a_warning():
    model = network()
    model[0].weight.data.mul_(1e-3)
    with pytest.warns(UserWarning, match="no weight in '0'; each keeps its best one") as warned:
        initialize(model, 0.9)
    assert warned[0].filename == __file__
    best = np.abs(model[0].weight.detach().numpy()).argmax()
    assert model[0].mask.numpy().ravel().nonzero()[0].tolist() == [best]
    assert model[0].num_kept + model[2].num_kept == kept(216 + 504, 0.9)


def test_sparsity_zero_keeps_everything():
    model = network()
    initialize(model, 0)
    assert sparsity(model) == (0, 0)
    assert all((layer.scores == 1).all() for layer in masked_layers(model).values())


def test_a_count_for_the_last_layer_goes_before_keeping_it_dense():
    model = network()
    initialize(model, budget={"0": 20, "2": 30, "4": 40})
    assert [layer.num_kept for layer in masked_layers(model).values()] == [20, 30, 40]
    initialize(model, budget={"0": 20, "2": 30})
    assert [layer.num_kept for layer in masked_layers(model).values()] == [20, 30, 140]


NAN = {"0": torch.full((8, 3, 3, 3), math.nan), "2": torch.ones(7, 8, 3, 3)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, "sparsity must be in [0, 1), got 1.0"),
        ({"sparsity": math.nan}, ValueError, "sparsity must be in [0, 1), got nan"),
        ({"sparsity": "0.9"}, TypeError, "sparsity must be a number, got str"),
        ({"sparsity": 2, "budget": {"0": 1, "2": 1}}, ValueError, "sparsity must be in [0, 1), got 2"),
        ({"eta": 1.01}, ValueError, "eta must be in [0, 1], got 1.01"),
        ({"eta": math.nan}, ValueError, "eta must be in [0, 1], got nan"),
        ({"eta": None}, TypeError, "eta must be a number, got NoneType"),
        ({"keep_last_dense": "False"}, TypeError, "keep_last_dense must be a bool, got str"),
        (
            {"criterion": "magnitud"},
            ValueError,
            "criterion must be one of magnitude, snip, grasp, random or a dict of tensors, got 'magnitud'",
        ),
        (
            {"criterion": None},
            ValueError,
            "criterion must be one of magnitude, snip, grasp, random or a dict of tensors, got None",
        ),
        (
            {"criterion": "random", "generator": 5},
            TypeError,
            "generator must be a torch.Generator, got int",
        ),
        ({"criterion": "snip"}, ValueError, "loss_fn must be given for criterion 'snip', got None"),
        (
            {"criterion": "grasp", "loss_fn": nn.functional.cross_entropy},
            ValueError,
            "batches must be given for criterion 'grasp', got None",
        ),
        ({"criterion": NAN}, ValueError, "importance of '0' must be finite, got NaN or inf"),
        (
            {"budget": "layer"},
            ValueError,
            "budget must be one of global, magnitude, uniform, erk or a dict of counts, got 'layer'",
        ),
        (
            {"budget": []},
            ValueError,
            "budget must be one of global, magnitude, uniform, erk or a dict of counts, got []",
        ),
        ({"budget": {"0": 1, "2": 1, "nose": 1}}, ValueError, "budget must name masked layers, got 'nose'"),
        ({"budget": {"0": 0, "2": 1}}, ValueError, "budget of '0' must be in [1, 216], got 0"),
        ({"budget": {"0": 1, "2": 505}}, ValueError, "budget of '2' must be in [1, 504], got 505"),
        ({"budget": {"0": 0.5, "2": 1}}, TypeError, "budget of '0' must be an integer, got float"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(options, error, message):
    model = network()
    initialize(model, 0.5, keep_last_dense=False)
    before = snapshot(model)
    with pytest.raises(error) as raised:
        initialize(model, **options)
    assert str(raised.value) == message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(layer.scores.requires_grad for layer in masked_layers(model).values())


def test_eta_may_be_any_number_of_python():
    model, wanted = network(), network()
    initialize(model, 0.5, eta=Fraction(99, 100))
    initialize(wanted, 0.5, eta=0.99)
    assert all(map(torch.equal, snapshot(model).values(), snapshot(wanted).values()))


def test_a_model_with_nothing_to_prune_is_refused():
    with pytest.raises(
        ValueError, match=r"^model must hold masked layers \(see convert\), got Linear without any$"
    ):
        initialize(nn.Linear(3, 3))
    model = convert(nn.Linear(3, 3))
    with pytest.raises(
        ValueError, match=r"^keep_last_dense must be False when '' is the only masked layer, got True$"
    ):
        initialize(model)
    initialize(model, 0.5, keep_last_dense=False)
    assert model.num_kept == 4


def test_nan_weights_are_refused():
    model = network()
    model[2].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"^importance of '2' must be finite, got NaN or inf$"):
        initialize(model)


def test_a_sharded_model_is_refused(shard):
    with pytest.raises(TypeError, match=r"^weight of '0' must be a plain tensor, got a DTensor "):
        initialize(shard(network()))


def test_weights_without_values_are_refused():
    wanted = r"^weight of '0' must hold values, got a tensor on meta; load a state or use to_empty first$"
    with pytest.raises(ValueError, match=wanted):
        initialize(network().to("meta"))
