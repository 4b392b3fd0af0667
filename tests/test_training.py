"""Dense training and fine-tuning under a mask (Eq. 31), against loops written out by hand."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import jackpot_kernels as jk
from jackpot_kernels.data import Batches, digits
from jackpot_kernels.models import DigitsNet
from jackpot_kernels.search.loop import Search
from jackpot_kernels.search.settings import SearchSettings, TrainingSettings
from jackpot_kernels.search.training import Training, unfreeze

TINY = TrainingSettings(epochs=4, batch_size=32, log_every=2)
STEPS_PER_EPOCH = 160 // 32


def network(seed=0, dropout=0.1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Dropout(dropout), DigitsNet(width=4))


def masked_network(dropout=0.1):
    model = jk.convert(network(dropout=dropout))
    jk.initialize(model, sparsity=0.7, budget="uniform")
    return model


@pytest.fixture(scope="module")
def data():
    train, test = digits()
    return TensorDataset(*train[:160]), TensorDataset(*test[:64])


def records(training):
    return [training.begin(), *training.run()]


def without_seconds(told):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in told]


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def by_hand(model, data, lrs, settings, masks=None):
    """Train by SGD as the textbook has it, with weights multiplied by masks where there are any."""
    torch.manual_seed(settings.seed)
    model.train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    momenta = {name: torch.zeros_like(w) for name, w in weights.items()}
    trained = weights.keys() if masks is None else masks.keys()
    batches = Batches(data[0], settings.batch_size, torch.device("cpu"), seed=settings.seed)
    for epoch, lr in enumerate(lrs):
        for inputs, labels in batches.shuffled(epoch):
            leaves = {name: w.requires_grad_(name in trained) for name, w in weights.items()}
            used = {name: w * masks[name] if masks and name in masks else w for name, w in leaves.items()}
            loss = F.cross_entropy(torch.func.functional_call(model, used, inputs), labels)
            grads = dict(
                zip(trained, torch.autograd.grad(loss, [leaves[name] for name in trained]), strict=True)
            )
            with torch.no_grad():
                for name in trained:
                    step = grads[name] + settings.weight_decay * weights[name]
                    momenta[name] = settings.momentum * momenta[name] + step
                    if settings.nesterov:
                        step = step + settings.momentum * momenta[name]
                    else:
                        step = momenta[name]
                    weights[name] = weights[name].detach() - lr * step
    return {name: w.detach() for name, w in weights.items()}


@pytest.mark.parametrize(
    ("changes", "lrs"),
    [
        ({}, [0.1, 0.1, 0.01, 0.001]),
        ({"nesterov": True, "schedule": "cosine", "momentum": 0.8}, [0.1, 0.0853553, 0.05, 0.0146447]),
    ],
    ids=["steps", "cosine"],
)
def test_dense_training_is_sgd(changes, lrs, data):
    settings = replace(TINY, **changes)
    training = Training(network(), *data, settings)
    told = records(training)
    assert [r["lr"] for r in told if r["kind"] == "epoch"] == pytest.approx(lrs, rel=1e-5)
    wanted = by_hand(network(), data, lrs, settings)
    for name, weight in wanted.items():
        torch.testing.assert_close(training.model.get_parameter(name).detach(), weight, atol=1e-4, rtol=1e-3)
    assert told[0]["parameters"] == sum(weight.numel() for weight in wanted.values())


def test_learns_and_tells(data):
    training = Training(network(), *data, replace(TINY, epochs=8, lr=0.3, batch_size=16))
    told = records(training)
    kinds = [record["kind"] for record in told]
    assert kinds[:12] == ["start", *5 * ["tick", "step"], "epoch"]
    assert kinds.count("epoch") == 8 and kinds[-1] == "end"
    last = told[-2]
    assert last["test_accuracy"] > 0.6 > 0.3 > told[0]["test_accuracy"]
    images, labels = data[1].tensors
    outputs = training.model.eval()(images)
    assert last["test_accuracy"] == (outputs.argmax(1) == labels).double().mean().item()
    assert last["test_loss"] == pytest.approx(F.cross_entropy(outputs, labels).item(), rel=1e-5)
    assert set(last) - set(told[2]) == {
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "seconds",
    }


def test_fine_tuning_trains_weights_under_their_masks(data):
    model = masked_network()
    masks = {f"{name}.weight": layer.mask for name, layer in jk.masked_layers(model).items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unfreeze(model)
    takes = {name for name, p in model.named_parameters() if p.requires_grad}
    assert takes == masks.keys()
    training = Training(model, *data, TINY)
    told = records(training)
    assert told[0]["parameters"] == sum(mask.numel() for mask in masks.values())
    wanted = by_hand(network(), data, [0.1, 0.1, 0.01, 0.001], TINY, masks)
    for name, weight in wanted.items():
        got = model.get_parameter(name).detach()
        torch.testing.assert_close(got, weight, atol=1e-4, rtol=1e-3)
        if name not in masks:
            assert torch.equal(got, before[name]), name
    for name, tensor in model.state_dict().items():
        if name.endswith(("scores", "mask_words")):
            assert torch.equal(tensor, before[name]), name
    losses = [record["train_loss"] for record in told if record["kind"] == "epoch"]
    assert losses[-1] < losses[0]


def test_fine_tuning_of_everything(data):
    model = masked_network()
    unfreeze(model, everything=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    records(Training(model, *data, replace(TINY, epochs=1)))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.endswith("scores")}


def test_scores_do_not_train(data):
    """Though they take gradients, as after a search."""
    model = masked_network()
    for layer in jk.masked_layers(model).values():
        layer.weight.requires_grad_()
    before = {name: layer.scores.clone() for name, layer in jk.masked_layers(model).items()}
    records(Training(model, *data, replace(TINY, epochs=1)))
    for name, layer in jk.masked_layers(model).items():
        assert torch.equal(layer.scores, before[name])


def fine_tuned(dropout=0.1):
    model = masked_network(dropout)
    unfreeze(model, everything=True)
    return model


@pytest.mark.parametrize("make", [network, fine_tuned])
@pytest.mark.parametrize("changes", [{}, {"channels_last": True, "nesterov": True, "amp": True}])
@pytest.mark.parametrize("steps", [1, 5, 7])
def test_resumes_bit_for_bit(make, changes, steps, data):
    settings = replace(TINY, epochs=2, **changes)
    whole = Training(make(), *data, settings)
    told = records(whole)
    parts = Training(make(), *data, settings)
    first = [parts.begin()]
    for record in parts.run():
        first.append(record)
        if record["step"] == steps:
            break
    state = parts.state_dict()
    torch.manual_seed(123)
    other = Training(make(), *data, settings)
    other.load_state_dict(state)
    rest = list(other.run())
    assert other.step == 2 * STEPS_PER_EPOCH
    assert without_seconds([*first, *rest]) == without_seconds(told)
    assert same_state(other.model, whole.model)


def searching(data, dropout=0.1, **changes):
    settings = SearchSettings(sparsity=0.5, lr=1.0, epochs=2, batch_size=32, log_every=1, **changes)
    return Search(network(dropout=dropout), *data, settings)


def training(data, dropout=0.1, **changes):
    return Training(fine_tuned(dropout), *data, replace(TINY, epochs=2, log_every=1, **changes))


def losses(told):
    return [record["loss"] for record in told if record["kind"] == "step"]


@pytest.mark.parametrize("make", [searching, training])
def test_compiled_steps_are_those_of_the_plain_model(make, data, monkeypatch):
    compiled, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or compile_(model))
    plain, ours = (losses(records(make(data, dropout=0.0, compile=choice))) for choice in (False, True))
    assert len(compiled) == 1
    assert ours == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("make", [searching, training])
def test_compiled_steps_resume_bit_for_bit(make, data):
    whole = make(data, compile=True)
    told = records(whole)
    parts = make(data, compile=True)
    first = [parts.begin()]
    for record in parts.run():
        first.append(record)
        if record["step"] == 3:
            break
    state = parts.state_dict()
    torch._dynamo.reset()  # as a new process would begin
    other = make(data, compile=True)
    other.load_state_dict(state)
    assert without_seconds([*first, *other.run()]) == without_seconds(told)
    assert same_state(other.model, whole.model)


@pytest.mark.parametrize(
    ("amp", "supported", "count"), [(True, False, 1), (True, True, 0), (False, False, 0)]
)
def test_amp_tells_of_a_processor_that_emulates_bfloat16(amp, supported, count, data, monkeypatch, recwarn):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False)
    searching(data, amp=amp)
    told = [str(w.message) for w in recwarn if "amp computes in bfloat16" in str(w.message)]
    assert len(told) == count


def test_refuses_the_state_of_another_training(data):
    training = Training(network(), *data, TINY)
    training.begin()
    state = training.state_dict()
    with pytest.raises(ValueError, match="settings of the state must be those given here"):
        Training(network(), *data, replace(TINY, lr=0.2)).load_state_dict(state)
    with pytest.raises(ValueError, match="state must have the shapes of the model"):
        Training(nn.Sequential(nn.Dropout(0.1), DigitsNet(width=8)), *data, TINY).load_state_dict(state)


def test_channels_last_is_a_memory_format(data):
    training = Training(network(), *data, replace(TINY, channels_last=True))
    assert training.model[1].features[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    search = Search(network(), *data, SearchSettings(epochs=1, batch_size=32, channels_last=True))
    told = records(search)
    layer = search.model[1].features[1][0]
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer.scores.is_contiguous() and not layer.weight.is_contiguous()
    assert told[-2]["overlap"] < 1


@pytest.mark.parametrize("normalization", ["stats", "recalibrate"])
def test_evaluations_may_be_rarer(normalization, data):
    settings = SearchSettings(epochs=5, batch_size=32, normalization=normalization)
    often, seldom = (Search(network(), *data, replace(settings, evaluate_every=every)) for every in (1, 2))
    all_told, told = records(often), records(seldom)
    epochs = [record for record in told if record["kind"] == "epoch"]
    assert [record["epoch"] for record in epochs if "test_accuracy" in record] == [2, 4, 5]
    assert [record["epoch"] for record in epochs if "test_loss" in record] == [2, 4, 5]
    for record, full in zip(without_seconds(told)[1:], without_seconds(all_told)[1:], strict=True):
        assert record.items() <= full.items() if "layers" not in record else record == full
    assert same_state(often.model, seldom.model)


def test_trainings_may_be_evaluated_at_the_end_only(data):
    told = records(Training(network(), *data, replace(TINY, evaluate_every=100)))
    assert [record["kind"] for record in told if "test_accuracy" in record] == ["start", "epoch"]
    assert "test_accuracy" in told[-2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"lr": float("nan")}, "lr must be finite in float32 and at least 0, got nan"),
        ({"momentum": 0, "nesterov": True}, "momentum must be above 0 for nesterov, got 0"),
        ({"schedule": "linear"}, "schedule must be one of steps, cosine, got 'linear'"),
        ({"epochs": 1.5}, "epochs must be int, got 1.5"),
        ({"epochs": True}, "epochs must be int, got True"),
        ({"lr": None}, "lr must be int | float, got None"),
        ({"amp": "abc"}, "amp must be bool, got 'abc'"),
    ],
)
def test_bad_settings(changes, sentence):
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        replace(TINY, **changes)
    assert replace(TINY, lr=1).lr == 1


def test_refuses_a_model_with_nothing_to_train(data):
    with pytest.raises(
        ValueError, match=r"model must have parameters to train \(see unfreeze\), got Sequential"
    ):
        Training(masked_network(), *data, TINY)
    with pytest.raises(ValueError, match="model must hold masked layers"):
        unfreeze(network())


def test_a_compiled_model_that_was_trained_and_frozen_again_is_not_stale():
    model, x = jk.convert(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))), torch.randn(4, 6)
    model(x)
    unfreeze(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x).square().sum().backward()
    torch.optim.SGD([layer.weight for layer in model], 0.1).step()
    model.requires_grad_(False)
    assert torch.equal(compiled(x), jk.finalize(model)(x))
