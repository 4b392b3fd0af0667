import errno
import json
from statistics import mean, stdev

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import jackpot_kernels as jk
from jackpot_kernels.cli import comparison
from jackpot_kernels.cli.app import app
from jackpot_kernels.cli.comparison import DENSE, METHODS, OURS, SPARSITIES, Comparison
from jackpot_kernels.data import Batches, digits
from jackpot_kernels.environment import environment
from jackpot_kernels.models import DigitsNet, digits_net
from jackpot_kernels.search.loop import initialize_masks
from jackpot_kernels.search.settings import SearchSettings


@pytest.fixture
def one_thread():
    """Compute on one thread, as the demo does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The output folder of a short demo, what it printed and what it found."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    options = ["--epochs", "1", "--dense-epochs", "2", "--seeds", "2", "--output", str(folder)]
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 0, (result.output, result.exception)
    return folder, result.stdout, json.loads((folder / "results.json").read_text())


def test_every_method_ran_at_every_sparsity_with_every_seed(demo):
    _, _, results = demo
    expected = [(DENSE, 0.0, seed) for seed in range(2)]
    expected += [(m, s, seed) for m in METHODS if m != DENSE for s in SPARSITIES for seed in range(2)]
    found = [(run["method"], run["sparsity"], run["seed"]) for run in results["runs"]]
    assert sorted(found) == sorted(expected)
    assert results["processor"] == environment()["cpu"]["processor"]
    assert results["versions"]["torch"] == torch.__version__


def test_table_holds_the_means_of_the_runs(demo):
    folder, printed, results = demo
    page = (folder / "report.html").read_text()
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in printed.splitlines() if "│" in line}
    assert list(rows) == list(METHODS)
    for method, cells in rows.items():
        for sparsity, cell in zip(SPARSITIES, cells, strict=True):
            level = 0.0 if method == DENSE else sparsity
            runs = [r for r in results["runs"] if (r["method"], r["sparsity"]) == (method, level)]
            accuracies = [100 * run["accuracy"] for run in runs]
            assert cell.strip() == f"{mean(accuracies):.1f} ± {stdev(accuracies):.1f}"
            assert f"<td>{cell.strip()}</td>" in page
    assert str(folder / "report.html") in printed


def test_files_are_those_of_the_first_seed(demo):
    folder, _, results = demo
    accuracies = {(r["method"], r["sparsity"]): r["accuracy"] for r in results["runs"] if r["seed"] == 0}
    images, labels = digits()[1].tensors
    dense, pruned = digits_net(), digits_net()
    dense.load_state_dict(load_file(folder / "dense.safetensors"))
    info = jk.load_jackpot(folder / "jackpot.safetensors", pruned)
    for model, run in ((dense, (DENSE, 0.0)), (pruned, (OURS, 0.9))):
        assert (model.eval()(images).argmax(1) == labels).double().mean().item() == accuracies[run]
    assert info.sparsity.masked == pytest.approx(0.9, abs=1e-4)
    for name, weight in pruned.named_parameters():
        kept = weight != 0 if name.endswith("weight") and weight.dim() > 1 else slice(None)
        assert torch.equal(weight[kept], dense.get_parameter(name)[kept])


@pytest.mark.parametrize("full", ["files.save_jackpot", "report.write_page"])
def test_a_disk_that_fills_up_is_one_sentence(full, monkeypatch, tmp_path):
    def write(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"jackpot_kernels.{full}", write)
    monkeypatch.setattr(comparison, "SPARSITIES", (0.9,))
    monkeypatch.setattr(comparison, "digits_net", lambda: DigitsNet(width=2))
    options = ["--epochs", "1", "--dense-epochs", "1", "--seeds", "1", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 2
    assert f"output must be a path that can be written to, got {tmp_path} (No space" in result.stderr


def test_searches_differ_by_their_method_alone(demo, monkeypatch):
    seen = []
    monkeypatch.setattr(comparison, "SPARSITIES", (0.95,))
    monkeypatch.setattr(comparison, "digits_net", lambda: DigitsNet(width=2))
    settings = SearchSettings(epochs=1, batch_size=256)
    for run, _ in (c := Comparison(digits(), settings, dense_epochs=1, seeds=1, watch=seen.append)).run():
        assert run.method in METHODS
    starts = [records[0] for records in c.records.values()]
    choices = [
        {k: v for k, v in s["settings"].items() if k not in ("schedule", "random_scores")} for s in starts
    ]
    assert choices[0] == choices[1] == choices[2]
    assert len({start["dense_accuracy"] for start in starts}) == 1
    assert len(seen) == c.total_epochs == 4


def test_random_scores_rank_as_their_mask():
    settings = SearchSettings(random_scores=True, sparsity=0.9)
    model, warm = jk.convert(digits_net()), jk.convert(digits_net())
    initialize_masks(model, settings, Batches(digits()[0], 64, torch.device("cpu")))
    warm.load_state_dict(model.state_dict())
    jk.initialize(warm, sparsity=0.9)
    for name, layer in list(jk.masked_layers(model).items())[:-1]:
        assert layer.scores[layer.mask].min() > layer.scores[~layer.mask].max()
        assert layer.num_kept == jk.masked_layers(warm)[name].num_kept


@pytest.mark.parametrize("seed", range(3))
def test_random_scores_are_not_the_draws_of_the_first_weights(seed):
    """A network made with the seed of its search, as the demo makes it."""
    torch.manual_seed(seed)
    model = jk.convert(digits_net())
    settings = SearchSettings(random_scores=True, seed=seed)
    initialize_masks(model, settings, Batches(digits()[0], 64, torch.device("cpu")))
    for name, layer in list(jk.masked_layers(model).items())[1:-1]:
        both = torch.stack([layer.scores.detach().flatten(), layer.weight.flatten()])
        assert torch.corrcoef(both)[0, 1].abs() < 0.05, name


@pytest.mark.parametrize("seed", range(3))
def test_random_scores_are_not_the_draws_of_a_random_mask(seed):
    model, train = jk.convert(digits_net()), Batches(digits()[0], 64, torch.device("cpu"))
    masks = []
    for choice in ({"random_scores": True}, {"criterion": "random"}):
        initialize_masks(model, SearchSettings(budget="uniform", seed=seed, **choice), train)
        masks.append({name: layer.mask for name, layer in list(jk.masked_layers(model).items())[:-1]})
    assert jk.overlap(*masks) == pytest.approx(0.9**2 + 0.1**2, abs=0.01)


def test_sr_popup_at_90_percent_is_within_a_point_of_dense(monkeypatch, one_thread):
    monkeypatch.setattr(comparison, "SPARSITIES", (0.9,))
    monkeypatch.setattr(comparison, "SEARCHES", {OURS: comparison.SEARCHES[OURS]})
    search = Comparison(digits(), comparison.SETTINGS, dense_epochs=20, seeds=1, watch=lambda text: None)
    accuracy = {run.method: run.accuracy for run, _ in search.run()}
    assert accuracy[DENSE] > 0.98
    assert accuracy[OURS] > accuracy[DENSE] - 0.01
