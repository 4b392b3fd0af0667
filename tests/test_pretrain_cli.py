"""``jackpot pretrain``: what it writes, how it stops and goes on, and what a search makes of it."""

import json
import signal

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from test_cli import PLAIN, invoke, small_data
from torch import nn

from jackpot_kernels.models import DigitsNet
from jackpot_kernels.report import training_figures, write_training_report
from jackpot_kernels.search.folder import SearchFolder, TrainingFolder
from jackpot_kernels.search.training import Training

TINY = ["--epochs", "2", "--batch-size", "32", "--log-every", "2", "--device", "cpu"]
RANDOM = ["--model", "test_pretrain_cli:unseeded_net", "--data", "test_cli:noisy_data"]


def unseeded_net():
    return nn.Sequential(nn.Dropout(0.1), DigitsNet(width=4))


def wide_net():
    return DigitsNet(width=8)


def five_classes():
    net = DigitsNet(width=4)
    net.classifier = nn.Linear(8, 5)
    return net


def pretrain(folder, *arguments, expect=0):
    result = invoke("pretrain", "--output", folder, *arguments)
    assert result.exit_code == expect, (result.output, result.exception)
    return result


def log(folder):
    records = TrainingFolder(folder).records()
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Leave out the plots, which take longer than the training; ``finished`` has them."""
    monkeypatch.setattr("jackpot_kernels.report.write_training_report", lambda *_, **__: "report.html")
    monkeypatch.setattr("jackpot_kernels.report.write_search_report", lambda *_, **__: "report.html")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    pretrain(folder, *PLAIN, *TINY)
    return folder


def test_writes_all_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "log.jsonl",
        "checkpoint.pt",
        "dense.safetensors",
        "report.html",
        "accuracy.png",
        "loss.png",
    }
    kinds = [record["kind"] for record in log(finished)]
    assert kinds == ["start", "step", "step", "epoch", "step", "step", "step", "epoch", "end"]


def test_weights_score_as_the_last_epoch_did(finished):
    model = DigitsNet(width=4)
    model.load_state_dict(load_file(finished / "dense.safetensors"))
    images, labels = small_data()[1].tensors
    accuracy = (model.eval()(images).argmax(1) == labels).double().mean().item()
    assert accuracy == log(finished)[-2]["test_accuracy"]
    with safe_open(finished / "dense.safetensors", "pt") as file:
        record = json.loads(file.metadata()["training"])
    assert record["test_accuracy"] == accuracy
    assert (record["model"], record["data"]) == ("test_cli:small_net", "test_cli:small_data")
    assert record["settings"] == log(finished)[0]["settings"]


def test_a_training_that_diverges_says_so_at_its_end(tmp_path):
    told = pretrain(tmp_path / "out", *PLAIN, *TINY, "--lr", "1e30").stdout
    assert "not finite" in told and (tmp_path / "out" / "dense.safetensors").exists()


def test_a_search_starts_from_them(finished, tmp_path):
    weights = ["--weights", finished / "dense.safetensors"]
    assert invoke("search", "--output", tmp_path / "out", *PLAIN, *TINY, *weights).exit_code == 0
    start = SearchFolder(tmp_path / "out").records()[0]
    assert start["dense_accuracy"] == log(finished)[-2]["test_accuracy"]


@pytest.mark.parametrize("steps", [(1,), (5,), (3, 8)])
def test_interrupted_training_goes_on_bit_for_bit(steps, monkeypatch, tmp_path):
    pretrain(tmp_path / "whole", *RANDOM, *TINY)
    count, train_step = 0, Training._train_step

    def step(self, inputs, labels):
        nonlocal count
        count += 1
        if count in steps:
            signal.raise_signal(signal.SIGINT)
        return train_step(self, inputs, labels)

    monkeypatch.setattr(Training, "_train_step", step)
    parts = tmp_path / "parts"
    stopped = pretrain(parts, *RANDOM, *TINY, expect=130)
    assert f"stopped at step {steps[0]} of 10; go on with: jackpot pretrain" in stopped.stderr
    assert f"--output {parts} --resume" in stopped.stderr
    for number in steps[1:]:
        assert f"stopped at step {number} " in pretrain(parts, "--resume", expect=130).stderr
    pretrain(parts, "--resume")
    assert log(parts) == log(tmp_path / "whole")
    weights = [(tmp_path / name / "dense.safetensors").read_bytes() for name in ("parts", "whole")]
    assert weights[0] == weights[1]


def test_seed_draws_the_first_weights(tmp_path):
    losses = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain(tmp_path / name, *RANDOM, *TINY, "--epochs", "1", "--seed", seed)
        losses[name] = log(tmp_path / name)[0]["test_loss"]
    assert losses["a"] == losses["b"] != losses["c"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([*PLAIN, "--epochs", "0"], "epochs must be at least 1, got 0"),
        ([*PLAIN, "--schedule", "linear"], "schedule must be one of steps, cosine, got 'linear'"),
        ([*PLAIN, "--model", "test_cli:two_classes"], "labels must be in [0, 2) for a model with 2 outputs"),
        ([*PLAIN, "--data", "test_cli:wide_data"], "model must take inputs of shape [8, 1, 8], but fails"),
        (["--resume"], "output must hold the checkpoint of a training, got"),
        (["--data", "digits"], "--model must be"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path):
    result = pretrain(tmp_path / "out", *arguments, expect=2)
    assert result.stderr.startswith(f"jackpot: {sentence}")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("wide_net", "must have the shapes of the model, 'features.0.0.weight' that of [8, 1, 3, 3], got"),
        (
            "five_classes",
            "must have the shapes of the model, 'classifier.weight' that of [5, 8], got [10, 8]",
        ),
        (
            "unseeded_net",
            "must have the names of the model's state dict, got '1.features.0.0.weight' missing",
        ),
    ],
)
def test_weights_of_another_network_are_refused(model, sentence, finished, tmp_path):
    weights = finished / "dense.safetensors"
    choice = ["--model", f"test_pretrain_cli:{model}", "--data", "test_cli:small_data", "--weights", weights]
    result = invoke("search", "--output", tmp_path / "out", *TINY, *choice)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"jackpot: weights of {weights} {sentence}")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_holds_one_kind(finished, tmp_path):
    before = (finished / "checkpoint.pt").read_bytes()
    resumed = invoke("search", "--output", finished, "--resume")
    assert resumed.exit_code == 2
    assert resumed.stderr.startswith("jackpot: checkpoint must be that of a search, got")
    assert "folder without a checkpoint" in pretrain(finished, *PLAIN, *TINY, expect=2).stderr
    assert "lr must be 0.1 as in the training to resume, got 0.2" in (
        pretrain(finished, "--resume", "--lr", "0.2", expect=2).stderr
    )
    assert (finished / "checkpoint.pt").read_bytes() == before


def test_report_is_made_from_the_log(finished, tmp_path):
    records = TrainingFolder(finished).records()
    report = write_training_report(records, tmp_path, facts={"model": "a<b>", "data": "digits"}).read_text()
    last = records[-2]
    for text in (f"{last['test_accuracy']:.2%}", f"{last['train_accuracy']:.2%}", "10 steps", "a&lt;b&gt;"):
        assert text in report
    untested = [{k: v for k, v in r.items() if not k.startswith("test") or r is last} for r in records[1:]]
    figures = training_figures([records[0], *untested], tmp_path)
    assert f"epoch 2 reaches {last['test_accuracy']:.2%}" in figures[0].caption
    assert training_figures(records[:2], tmp_path) == []
