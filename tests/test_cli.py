import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from typer.testing import CliRunner

import jackpot_kernels as jk
from jackpot_kernels.cli import main
from jackpot_kernels.cli.app import app
from jackpot_kernels.cli.common import choose_device
from jackpot_kernels.data import DATA, digits
from jackpot_kernels.models import MODELS, DigitsNet
from jackpot_kernels.search.folder import SearchFolder
from jackpot_kernels.search.loop import Search

TINY = ["--epochs", "2", "--batch-size", "32", "--log-every", "2", "--device", "cpu"]
PLAIN = ["--model", "test_cli:small_net", "--data", "test_cli:small_data"]
RANDOM = ["--model", "test_cli:dropout_net", "--data", "test_cli:noisy_data"]
STEPS = 2 * 5


def small_net():
    torch.manual_seed(0)
    return DigitsNet(width=4)


def dropout_net():
    return nn.Sequential(nn.Dropout(0.1), small_net())


def two_classes():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


def unnormalized():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 10))


def small_data():
    train, test = digits()
    return TensorDataset(*train[:160]), TensorDataset(*test[:64])


def wide_data():
    return (torch.zeros(8, 1, 8), torch.arange(8)), (torch.zeros(8, 1, 8), torch.arange(8))


def noisy_data():
    return Noisy(small_data()[0]), small_data()[1]


class Noisy(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.data[index]
        return image + 0.1 * torch.randn_like(image), label


def mislabelled_data():
    return Mislabelled(small_data()[0]), small_data()[1]


def mislabelled_test():
    return mislabelled_data()[::-1]


class Mislabelled(Noisy):
    def __getitem__(self, index):
        return self.data[index][0], 10 if index == 100 else 0


def not_a_net():
    return "a net"


def needs_an_argument(width):
    return DigitsNet(width)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def search(folder, *arguments, expect=0):
    result = invoke("search", "--output", folder, *arguments)
    assert result.exit_code == expect, (result.output, result.exception)
    return result


def log(folder):
    """The records of a search without the times, which no two runs share."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in SearchFolder(folder).records()]


def tensors(folder):
    """Model, momentum and counts of a checkpoint."""
    state = SearchFolder(folder).load()
    momenta = [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()]
    return [*state["model"].values(), *momenta, state["optimizer"]["search"]["control"], state["rng"]["cpu"]]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Leave out the plots, which take longer than the searches; ``finished`` has them."""
    monkeypatch.setattr("jackpot_kernels.report.write_search_report", lambda *_, **__: "report.html")


@pytest.fixture
def interrupt(monkeypatch):
    """Make Ctrl-C arrive in the middle of the steps with the given numbers, counted over all searches."""

    def at(*numbers):
        count = 0
        train_step = Search._train_step

        def step(self, inputs, labels):
            nonlocal count
            count += 1
            if count in numbers:
                signal.raise_signal(signal.SIGINT)
            return train_step(self, inputs, labels)

        monkeypatch.setattr(Search, "_train_step", step)

    return at


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished search."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    search(folder, *PLAIN, *TINY)
    return folder


def test_search_writes_all_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    plots = {"accuracy.png", "loss.png", "swaps.png", "overlap.png", "layers.png"}
    assert names == {"log.jsonl", "checkpoint.pt", "jackpot.safetensors", "report.html"} | plots
    kinds = [record["kind"] for record in log(finished)]
    assert kinds == ["start", "step", "step", "epoch", "step", "step", "step", "epoch", "end"]
    steps = [record for record in log(finished) if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [2, 4, 6, 8, 10]
    assert all(0 <= record["granted"] <= record["proposed"] for record in steps)
    assert sum(record["granted"] for record in steps) > 0
    assert [record["lr"] for record in steps] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.05])


def test_search_trains_no_weight_and_keeps_its_sparsity(finished):
    model, plain = jk.convert(small_net()), small_net()
    model.load_state_dict(SearchFolder(finished).load()["model"])
    for name, layer in jk.masked_layers(model).items():
        assert torch.equal(layer.weight, plain.get_submodule(name).weight)
    searched = sum(layer.weight.numel() for layer in list(jk.masked_layers(model).values())[:-1])
    removed = sum(layer.weight.numel() - layer.num_kept for layer in jk.masked_layers(model).values())
    assert removed == -(-searched * 9 // 10)
    assert log(finished)[-1]["sparsity_masked"] == pytest.approx(removed / searched)


def test_jackpot_scores_as_the_last_epoch_did(finished):
    model = DigitsNet(width=4)
    jk.load_jackpot(finished / "jackpot.safetensors", model)
    images, labels = small_data()[1].tensors
    accuracy = (model.eval()(images).argmax(1) == labels).double().mean().item()
    assert accuracy == log(finished)[-2]["test_accuracy"]


@pytest.mark.parametrize("choice", [PLAIN, RANDOM], ids=["tensors", "augmented"])
@pytest.mark.parametrize("steps", [(1,), (5,), (7,), (3, 4, 9)])
def test_interrupted_search_goes_on_bit_for_bit(choice, steps, interrupt, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*choice, *TINY, "--pairs", "random"]
    search(whole, *options)
    interrupt(*steps)
    stopped = search(parts, *options, expect=130)
    assert f"stopped at step {steps[0]} of {STEPS}; go on with: jackpot search" in stopped.stderr
    assert f"--output {parts} --resume" in stopped.stderr
    for step in steps[1:]:
        assert f"stopped at step {step} " in search(parts, "--resume", expect=130).stderr
    search(parts, "--resume")
    assert log(parts) == log(whole)
    assert all(torch.equal(a, b) for a, b in zip(tensors(parts), tensors(whole), strict=True))
    assert (parts / "jackpot.safetensors").read_bytes() == (whole / "jackpot.safetensors").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        ["--scope", "global", "--schedule", "constant"],
        ["--random-scores", "--schedule", "single", "--no-keep-last-dense"],
        ["--criterion", "snip", "--budget", "erk", "--normalization", "recalibrate"],
        ["--normalization", "frozen", "--amp", "--criterion", "random", "--budget", "uniform"],
        ["--compat", "authors", "--channels-last", "--evaluate-every", "2"],
    ],
    ids=lambda options: options[1],
)
def test_every_kind_of_search_resumes(options, interrupt, tmp_path):
    search(tmp_path / "whole", *PLAIN, *TINY, *options)
    interrupt(6)
    search(tmp_path / "parts", *PLAIN, *TINY, *options, expect=130)
    search(tmp_path / "parts", "--resume")
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    pairs = zip(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_search_that_was_killed_goes_on_from_its_last_checkpoint(finished, monkeypatch, tmp_path):
    epoch = Search._end_epoch

    def killed(self):
        if self.step == STEPS:
            raise SystemExit(9)
        return epoch(self)

    monkeypatch.setattr(Search, "_end_epoch", killed)
    search(tmp_path / "out", *PLAIN, *TINY, expect=9)
    with (tmp_path / "out/log.jsonl").open("a") as file:
        file.write('{"kind": "st')
    monkeypatch.setattr(Search, "_end_epoch", epoch)
    search(tmp_path / "out", "--resume")
    assert log(tmp_path / "out") == log(finished)


def test_full_disk_leaves_the_last_checkpoint(monkeypatch, tmp_path):
    save = torch.save

    def full(state, file):
        if state["position"] == (1, 0):
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    result = search(tmp_path / "out", *PLAIN, *TINY, expect=2)
    assert "No space left on device" in result.stderr.splitlines()[-1]
    assert SearchFolder(tmp_path / "out").load()["position"] == (0, 0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint.pt", "log.jsonl"]


@pytest.mark.parametrize("full", ["search.folder.write_whole", "files.save_jackpot"])
def test_full_disk_at_the_start_or_the_end_names_the_output(full, monkeypatch, tmp_path):
    def write(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"jackpot_kernels.{full}", write)
    told = search(tmp_path / "out", *PLAIN, *TINY, expect=2).stderr.splitlines()[-1]
    wanted = f"output must be a path that can be written to, got {tmp_path / 'out'}"
    assert told == f"jackpot: {wanted} (No space left on device)"


FULL_DISK = """
import resource, sys, torch
from jackpot_kernels.search.folder import SearchFolder
folder = SearchFolder(sys.argv[1])
folder.create()
folder.save({"settings": {}, "model": {}, "position": (0, 0)})
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    folder.save({"settings": {}, "model": torch.zeros(5000), "position": (1, 0)})
except OSError as error:
    print("refused:", error.strerror, folder.load()["position"])
"""


def test_a_disk_that_is_really_full_leaves_the_last_checkpoint(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "refused: File too large (0, 0)\n", done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint.pt", "log.jsonl"]


@pytest.mark.parametrize(
    ("part", "value", "sentence"),
    [
        ("names", None, "checkpoint of the search must hold names, got None"),
        ("settings", 1, "checkpoint of the search must hold settings, got 1"),
        ("optimizer", None, "checkpoint must be whole, got "),
        ("rng", {}, "checkpoint must be whole, got "),
    ],
)
def test_a_checkpoint_without_a_part_is_refused(part, value, sentence, finished, tmp_path):
    for name in ("checkpoint.pt", "log.jsonl"):
        shutil.copy(finished / name, tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(state | {part: value}, tmp_path / "checkpoint.pt")
    assert sentence in search(tmp_path, "--resume", expect=2).stderr


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_in_which_another_run_is_at_work_is_refused(resume, interrupt, tmp_path):
    interrupt(2)
    search(tmp_path, *PLAIN, *TINY, expect=130)
    if not resume:
        (tmp_path / "checkpoint.pt").unlink()
        (tmp_path / "log.jsonl").write_text("")  # as before the first record
    before = sorted(tmp_path.iterdir()), resume and log(tmp_path)
    with SearchFolder(tmp_path).alone():
        told = search(tmp_path, *(["--resume"] if resume else [*PLAIN, *TINY]), expect=2).stderr
    assert told == f"jackpot: output must be a folder in which no other run is at work, got {tmp_path}\n"
    assert (sorted(tmp_path.iterdir()), resume and log(tmp_path)) == before


def test_finished_search_resumes_to_the_same_end(finished, tmp_path):
    before = log(finished), (finished / "jackpot.safetensors").read_bytes()
    search(finished, "--resume")
    assert (log(finished), (finished / "jackpot.safetensors").read_bytes()) == before


def test_evaluate_names_a_wrong_label(finished):
    file, data = finished / "jackpot.safetensors", "test_cli:mislabelled_test"
    result = invoke("evaluate", file, *PLAIN, "--data", data, "--batch-size", "16", "--device", "cpu")
    assert result.exit_code == 2 and result.stderr.startswith(
        "jackpot: labels must be in [0, 10) for a model"
    )


def test_evaluate_prints_what_the_search_found(finished):
    file = finished / "jackpot.safetensors"
    result = invoke("evaluate", file, *PLAIN, "--device", "cpu")
    assert result.exit_code == 0
    records = log(finished)
    dense = sum(tensor.nbytes for tensor in small_net().state_dict().values())
    for text in (
        f"{records[-2]['test_accuracy']:.2%}",
        f"{records[-1]['sparsity_masked']:.2%}",
        f"{records[-1]['sparsity_overall']:.2%}",
        f"{file.stat().st_size:,} bytes",
        f"{dense:,} bytes",
        "test_cli:small_net",
    ):
        assert text in result.stdout


@pytest.mark.parametrize("text", ["of [lr=0.1]", "[/x]", "\x1b]0;title\x07"])
def test_tables_show_names_as_they_are(text, tmp_path):
    jk.save_jackpot(small_net(), tmp_path / "a.safetensors", source=text)
    result = invoke("evaluate", tmp_path / "a.safetensors", *PLAIN)
    assert result.exit_code == 0
    assert text.replace("\x1b", r"\x1b").replace("\x07", r"\x07") in result.stdout


def test_export_of_a_search(finished, tmp_path):
    jackpot, dense = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert invoke("export", finished, "--jackpot", jackpot, "--dense", dense).exit_code == 0
    assert jackpot.read_bytes() == (finished / "jackpot.safetensors").read_bytes()
    loaded, plain = DigitsNet(width=4).eval(), DigitsNet(width=4).eval()
    jk.load_jackpot(jackpot, loaded)
    plain.load_state_dict(load_file(dense))
    images = small_data()[1].tensors[0]
    assert torch.equal(loaded(images), plain(images))


def test_the_command_to_go_on_with_can_be_pasted(interrupt, tmp_path):
    interrupt(3)
    told = search(tmp_path / "of mine", *PLAIN, *TINY, expect=130).stderr.splitlines()[-1]
    command = shlex.split(told.partition("go on with: ")[2])
    assert command == ["jackpot", "search", "--output", str(tmp_path / "of mine"), "--resume"]


def test_export_of_an_interrupted_search(interrupt, tmp_path):
    interrupt(3)
    search(tmp_path / "out", *PLAIN, *TINY, expect=130)
    assert invoke("export", tmp_path / "out", "--jackpot", tmp_path / "a.safetensors").exit_code == 0
    masks = {
        k: v for k, v in SearchFolder(tmp_path / "out").load()["model"].items() if k.endswith("mask_words")
    }
    model = DigitsNet(width=4)
    jk.load_jackpot(tmp_path / "a.safetensors", model)
    for key, words in masks.items():
        weight = model.get_parameter(key.replace("mask_words", "weight"))
        assert torch.equal(jk.unpack_mask(words, weight.shape), weight != 0)


def test_export_of_a_jackpot_file(finished, tmp_path):
    source, dense = finished / "jackpot.safetensors", tmp_path / "b.safetensors"
    assert invoke("export", source, "--dense", dense, "--model", "test_cli:small_net").exit_code == 0
    assert invoke("export", finished, "--dense", tmp_path / "c.safetensors").exit_code == 0
    assert dense.read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_export_writes_through_a_link(finished, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "b.safetensors")
    assert invoke("export", finished, "--dense", tmp_path / "link").exit_code == 0
    assert (tmp_path / "link").is_symlink() and load_file(tmp_path / "b.safetensors")


def test_export_leaves_devices_alone(finished, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    result = invoke("export", finished, "--dense", tmp_path / "pipe")
    assert result.exit_code == 2 and "(not a regular file)" in result.stderr
    assert (tmp_path / "pipe").is_fifo()


def test_weights_are_loaded(tmp_path):
    torch.manual_seed(1)
    model = DigitsNet(width=4)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    search(tmp_path / "out", *PLAIN, *TINY, "--weights", tmp_path / "w.safetensors")
    state = SearchFolder(tmp_path / "out").load()["model"]
    assert torch.equal(state["features.1.0.weight"], model.features[1][0].weight)


def test_env_prints_facts():
    result = invoke("env", "--json")
    assert json.loads(result.stdout)["versions"]["torch"] == torch.__version__
    table = invoke("env").stdout
    assert "versions.torch" in table and torch.__version__ in table


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--sparsity", "1.5"], "sparsity must be in [0, 1), got 1.5"),
        (["--sparsity", "nan"], "sparsity must be in [0, 1), got nan"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--batch-size", "-4"], "batch_size must be at least 1, got -4"),
        (["--lr", "1e39"], "lr must be finite in float32 and at least 0, got 1e+39"),
        (["--seed", "20240101123456789"], "seed must be below 2**32, got 20240101123456789"),
        (["--lr", "-1"], "lr must be finite in float32 and at least 0, got -1.0"),
        (["--eta", "2"], "eta must be in [0, 1], got 2.0"),
        (["--schedule", "cubic"], "schedule must be one of quartic, inverse, constant, single, got 'cubic'"),
        (["--scope", "block"], "scope must be one of layer, global, got 'block'"),
        (["--pairs", "worst"], "pairs must be one of best, inverse, random, got 'worst'"),
        (["--criterion", "taylor"], "criterion must be one of magnitude, snip, grasp, random, got 'taylor'"),
        (["--budget", "even"], "budget must be one of global, magnitude, uniform, erk, got 'even'"),
        (["--normalization", "off"], "normalization must be one of stats, frozen, recalibrate, got 'off'"),
        (["--device", "abacus"], "device must be one that torch can use here, got 'abacus'"),
        (["--device", "meta"], "device must be one that torch can use here, got 'meta'"),
        (
            ["--model", "digits_net"],
            f"model must be {', '.join(MODELS)} or module:callable, got 'digits_net'",
        ),
        (
            ["--model", "no_such_module:net"],
            "model must name a module that can be imported, got 'no_such_module:net'",
        ),
        (
            ["--model", "test_cli:no_such_net"],
            "model must name a callable of module 'test_cli', got 'test_cli:no_such_net'",
        ),
        (["--model", "test_cli:PLAIN"], "model must name a callable, got 'test_cli:PLAIN', a list"),
        (["--model", "test_cli:not_a_net"], "model must return a torch.nn.Module, got str"),
        (["--model", "test_cli:needs_an_argument"], "model must be a callable that needs no argument"),
        (["--model", "test_cli:two_classes"], "labels must be in [0, 2) for a model with 2 outputs, got 9"),
        (["--data", "test_cli:wide_data"], "model must take inputs of shape [8, 1, 8], but fails"),
        (["--data", "test_cli:small_net"], "data must return a pair (train, test), got DigitsNet"),
        (["--data", "cifar"], f"data must be {', '.join(DATA)} or module:callable, got 'cifar'"),
        (["--data", "cifar100"], "cifar100 must be in no-such-folder/cifar-100-binary or "),
        (["--data", "imagenet"], "imagenet must be in no-such-folder/imagenet as train and val"),
        (["--model", "vgg19-cifar10"], "model must take inputs of shape [32, 1, 8, 8], but fails"),
        (["--weights", "absent.safetensors"], "weights must be an existing file, got absent.safetensors"),
        (
            ["--model", "test_cli:unnormalized", "--normalization", "frozen"],
            "model must hold batch normalisation",
        ),
        (["--resume"], "output must hold the checkpoint of a search"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(options, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("JACKPOT_DATA", "no-such-folder")
    result = search(tmp_path / "out", *PLAIN, *TINY, *options, expect=2)
    assert result.stderr.startswith(f"jackpot: {sentence}")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "backend, sentence",
    [
        ("cudnn", "the environment variable JACKPOT_BACKEND must be one of auto, fused, mixed, dense, refer"),
        ("fused", 'backend="fused" cannot run: it needs CUDA tensors, or TRITON_INTERPRET=1'),
    ],
)
def test_backend_that_cannot_run_is_one_sentence(backend, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr("jackpot_kernels.kernels.availability.interpreting", lambda: False)
    monkeypatch.setenv("JACKPOT_BACKEND", backend)
    result = search(tmp_path / "out", *PLAIN, *TINY, expect=2)
    assert result.stderr.startswith(f"jackpot: {sentence}")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "damage", [lambda log: b"?" + log[1:], lambda log: log.replace(b'"start"', b'"stare"', 1)]
)
def test_a_damaged_log_is_named(damage, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    log = folder / "log.jsonl"
    log.write_bytes(damage(log.read_bytes()))
    *_, found = search(folder, "--resume", expect=2).stderr.splitlines()
    assert found == f"jackpot: log must hold the records of a search from its start on, got {log}"


def test_search_wants_model_and_data(tmp_path):
    assert (
        f"model must be {', '.join(MODELS)} or module:callable, got none" in search(tmp_path, expect=2).stderr
    )
    assert f"data must be {', '.join(DATA)} or" in search(tmp_path, "--model", "digits", expect=2).stderr


def test_search_on_a_gpu_wants_kernels_for_it(monkeypatch, tmp_path):
    zeros = torch.zeros
    monkeypatch.setattr("jackpot_kernels._extension.build_facts", lambda: {"cuda_archs": []})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: zeros(*size, **options | {"device": "cpu"}))
    assert choose_device("auto").type == "cuda"
    assert choose_device("auto", search=True).type == "cpu"
    result = search(tmp_path / "out", *PLAIN, "--device", "cuda", expect=2)
    assert "device must be cpu where the extension was built without CUDA kernels" in result.stderr


def test_output_must_be_writable(tmp_path):
    (tmp_path / "file").write_text("")
    result = search(tmp_path / "file/out", *PLAIN, *TINY, expect=2)
    assert f"output must be a folder that can be written to, got {tmp_path}/file/out" in result.stderr


def test_a_log_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "log.jsonl").write_text("mine\n")
    result = search(tmp_path, *PLAIN, *TINY, expect=2)
    assert f"folder without a log, got {tmp_path}/log.jsonl and no checkpoint" in result.stderr
    assert (tmp_path / "log.jsonl").read_text() == "mine\n" and not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_label_met_on_the_way_is_one_sentence(workers, tmp_path):
    options = ["--data", "test_cli:mislabelled_data", "--workers", workers]
    result = search(tmp_path, *PLAIN, *TINY, *options, expect=2)
    sentence = "search stopped by: labels must be in [0, 10) for a model with 10 outputs, got 10; go on from"
    assert f"jackpot: {sentence} its last checkpoint with: jackpot search" in result.stderr
    assert SearchFolder(tmp_path).load()["position"] == (0, 0)


def test_finished_search_is_not_overwritten(finished):
    before = (finished / "checkpoint.pt").read_bytes(), (finished / "log.jsonl").read_bytes()
    result = search(finished, *PLAIN, *TINY, expect=2)
    assert f"output must be a folder without a checkpoint, got {finished} with one" in result.stderr
    assert ((finished / "checkpoint.pt").read_bytes(), (finished / "log.jsonl").read_bytes()) == before


def test_resumed_search_keeps_its_settings(finished):
    result = search(finished, "--resume", "--lr", "0.2", expect=2)
    assert "lr must be 0.1 as in the search to resume, got 0.2" in result.stderr


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "foreign", "truncated"])
def test_damaged_checkpoint_is_refused(content, finished, tmp_path):
    whole = (finished / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2] if content is None else content)
    result = search(tmp_path, "--resume", expect=2)
    assert f"checkpoint must be whole, got {tmp_path}/checkpoint.pt" in result.stderr


def test_checkpoint_is_never_unpickled(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (exec, ("raise SystemExit('executed')",))

    torch.save(
        {"position": (0, 0), "log_bytes": 0, "settings": Hostile(), "model": {}}, tmp_path / "checkpoint.pt"
    )
    assert "checkpoint must be whole" in search(tmp_path, "--resume", expect=2).stderr


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file(DigitsNet(width=8).state_dict(), tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"no weights")
    for name, sentence in (
        ("a", "must have the names of the model's state dict, got 'features.0.0.weight' missing"),
        ("b", "'features.0.0.weight' that of [4, 1, 3, 3], got [8, 1, 3, 3]"),
        ("c", "weights must be a safetensors file"),
    ):
        weights = tmp_path / f"{name}.safetensors"
        assert sentence in search(tmp_path / "out", *PLAIN, "--weights", weights, expect=2).stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["evaluate", "{}/jackpot.safetensors", "--model", "digits", "--data", "digits"],
            "features.0.0.weight",
        ),
        (["evaluate", "absent", *PLAIN], "file must be a jackpot file, got absent, which is no file"),
        (["evaluate", "{}", *PLAIN], "which is no file"),
        (["export", "{}"], "give --jackpot FILE, --dense FILE or both, got neither"),
        (
            ["export", "absent", "--dense", "a"],
            "source must be the output folder of a search or a jackpot file",
        ),
        (["export", "{}/jackpot.safetensors", "--dense", "a"], "model must be given with a jackpot file"),
        (["export", "{}", "--dense", "a", "--model", "digits"], "must have the shapes of the model"),
        (["export", "{}", "--dense", "{}/no/such"], "dense must be a path that can be written to, got"),
        (["export", "{}", "--jackpot", "{}/no/such"], "jackpot must be a path that can be written to"),
        (["demo", "--output", "{}/log.jsonl"], "output must be a path that can be written to, got"),
    ],
)
def test_bad_files_are_one_sentence(arguments, sentence, finished):
    result = invoke(*(argument.format(finished) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("module", ["typer", "rich.console"])
def test_missing_extra_is_one_sentence(module, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("jackpot_kernels.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=r'run pip install "jackpot_kernels\[cli\]"'):
        main()


def test_missing_scikit_learn_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = search(tmp_path / "out", "--model", "digits", "--data", "digits", expect=2)
    assert result.stderr.strip().endswith('pip install "jackpot_kernels[cli]"')
