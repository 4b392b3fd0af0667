"""Ordinary training on a CUDA device: one graph a step, with the bits of the steps without it."""

import pytest
import torch

from jackpot_kernels.data import Batches, digits
from jackpot_kernels.models import digits_net
from jackpot_kernels.search.evaluation import evaluate
from jackpot_kernels.search.loop import Search
from jackpot_kernels.search.settings import SearchSettings, TrainingSettings
from jackpot_kernels.search.training import Training

pytestmark = pytest.mark.gpu


def trained(graphed: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
    torch.manual_seed(0)
    training = Training(digits_net(), *digits(), TrainingSettings(epochs=4, schedule="steps"), "cuda")
    training.begin()
    if not graphed:
        training._take_step = training._plain_step
    losses = [record["train_loss"] for record in training.run() if record["kind"] == "epoch"]
    return training.model.state_dict(), losses


def test_replays_have_the_bits_of_steps_without_a_graph():
    (ours, losses), (plain, wanted) = trained(True), trained(False)
    assert losses == wanted and losses[-1] < losses[0] / 2
    for name, tensor in plain.items():
        assert torch.equal(ours[name], tensor), name


def test_compiled_steps_are_captured_and_end_where_plain_ones_do():
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        fast = {"amp": True, "channels_last": True, "compile": compiled}
        settings = SearchSettings(sparsity=0.5, epochs=4, batch_size=64, lr=1.0, **fast)
        search = Search(digits_net(), *digits(), settings, "cuda")
        told = [search.begin(), *search.run()]
        assert search._take_step._graph is not None
        found.append(told[-2])
    plain, ours = found
    assert ours["train_loss"] == pytest.approx(plain["train_loss"], rel=0.05)
    assert ours["overlap"] == pytest.approx(plain["overlap"], abs=0.02) and ours["overlap"] < 0.9
    assert ours["train_loss"] < 1.8


def test_a_test_in_larger_batches_counts_every_image_once():
    train, test = digits()
    training = Training(digits_net(), train, test, TrainingSettings(batch_size=32), "cuda")
    assert training.test.batch_size == 128 and len(test) % 128 % 32 != 0
    got = evaluate(training.model, training.test)
    wanted = evaluate(training.model, Batches(test, 32, training.device))
    assert got.accuracy == wanted.accuracy
    assert got.loss == pytest.approx(wanted.loss, rel=1e-5)
