"""The paper's tables and figures: what is run, what is kept of it, and what is shown."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.paper import execute, pages, runs
from benchmarks.paper.__main__ import main
from benchmarks.paper.experiments import EXPERIMENTS, runs_of
from benchmarks.paper.pages import write_report
from benchmarks.paper.paper_values import SLIPS, TABLES
from benchmarks.paper.results import Results
from benchmarks.paper.runs import Workshop
from benchmarks.paper.scales import FULL, REDUCED, SCALES, SMOKE, Run, Spec
from benchmarks.paper.tables import Findings, table
from jackpot_kernels.data import DATA, digits
from jackpot_kernels.models import MODELS, digits_net
from jackpot_kernels.search.loop import Search
from jackpot_kernels.search.settings import SearchSettings, TrainingSettings

ROOT = Path(__file__).parent.parent


def command(*arguments: str) -> tuple[int, str, str]:
    """Run the command and return its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([*map(str, arguments), "--device", "cpu"])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, out.getvalue(), err.getvalue()


def smoke_command(what: str, folder: object, *arguments: str) -> tuple[int, str, str]:
    return command(what, "--scale", "smoke", "--output", str(folder), *arguments)


def search(**options: object) -> Run:
    """Return a search of the smoke scale, at 90 % in 2 epochs."""
    (run,) = (r for r in runs_of(["table7"], SMOKE, 1) if r.kind == "search" and len(r.options) == 3)
    return replace(run, options=tuple(sorted({**dict(run.options), **options}.items())))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Runs that are made again come out as they did."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of every table and figure at smoke scale."""
    folder = tmp_path_factory.mktemp("paper")
    code, _, err = smoke_command("all", folder)
    assert code == 0, err
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Leave out the plots, which take longer than all else where hardly a run is made."""
    monkeypatch.setattr(pages, "draw", lambda *_: None)


@pytest.fixture
def copy(smoke, tmp_path, undrawn):
    """A copy of it that may be damaged."""
    return shutil.copytree(smoke, tmp_path / "copy")


@pytest.fixture
def made(monkeypatch):
    """The runs that are made from now on."""
    seen, make = [], Workshop.make

    def watched(workshop, run):
        seen.append(run)
        return make(workshop, run)

    monkeypatch.setattr(Workshop, "make", watched)
    return seen


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_smoke_answers_every_cell(smoke, name):
    findings = Findings(Results(smoke), SMOKE, 1)
    experiment = EXPERIMENTS[name]
    cells = [cell for row in experiment.rows for cell in row.cells if cell and "smoke" in cell.scales]
    assert cells
    for cell in cells:
        # Of swaps in a small network some are proposed too seldom for a mean.
        assert findings.summary(cell) is not None or cell.measure.endswith("best_1024"), cell
    header, lines = table(name, findings)
    assert all(len(line) == len(header) for line in lines)
    report = (smoke / "report.md").read_text()
    assert experiment.title in report
    assert (f"({name}.png)" in report) == bool(experiment.plot)
    if experiment.plot:
        assert (smoke / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_page_shows_every_experiment_with_its_plot(smoke):
    page = (smoke / "report.html").read_text()
    assert page.count("<h2>") == len(EXPERIMENTS)
    assert page.count("data:image/png") == sum(bool(e.plot) for e in EXPERIMENTS.values())
    for quoted in ("93.70±0.12", "75.71", "65.41", "90.76"):
        assert f"<td>{quoted}</td>" in page


def test_lines_tell_how_they_came_about(smoke):
    lines = [json.loads(line) for line in (smoke / "results.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == len(runs_of(EXPERIMENTS, SMOKE, 1))
    for line in lines:
        assert line["versions"]["torch"] == torch.__version__
        assert line["loader"] == "TensorDataset"
        assert line["threads"] == 1 and line["device"].startswith("cpu") and line["seconds"] > 0
        assert line["commit"] and line["seed"] == line["configuration"]["seed"] == 0
        if line["configuration"]["kind"] in ("train", "search", "finetune"):
            epochs = line["epochs"]
            assert len(epochs) == line["configuration"]["epochs"]
            assert line["accuracy"] == epochs[-1]["test_accuracy"]
            assert line["best_on_test"] == max(epoch["test_accuracy"] for epoch in epochs)
            assert all(epoch["train_loss"] > 0 and epoch["seconds"] > 0 for epoch in epochs)
            assert sum(epoch["seconds"] for epoch in epochs) <= line["seconds"]
    (dense,) = {line["accuracy"] for line in lines if line["configuration"]["kind"] == "train"}
    searches = [line for line in lines if line["configuration"]["kind"] == "search"]
    for line in searches:
        source = line["configuration"]["source"]["kind"]
        assert (line["dense_accuracy"] == dense) == (source == "train")
        sparsity = line["configuration"]["options"]["sparsity"]
        assert line["sparsity_masked"] == pytest.approx(sparsity, abs=1e-3)
        assert line["sparsity_overall"] == pytest.approx(sparsity * (1 - 640 / 56_224), abs=1e-3)


def test_distortions_are_summed_up_as_they_were_measured(smoke):
    lines = [json.loads(line) for line in (smoke / "results.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["configuration"]["kind"] == "distortion"]
    draws = {}
    for record in line["distortion"]:
        assert record["epsilon"] == record["measured"] - record["expected"]
        draws.setdefault(f"{record['kind']}_{record['q']}", []).append(record["epsilon"])
    assert len(draws) > 2
    for name, epsilons in draws.items():
        assert line[f"mean_{name}"] == pytest.approx(np.mean(epsilons))
        assert line[f"deviation_{name}"] == pytest.approx(np.std(epsilons, ddof=1))


def test_a_mask_without_a_search_is_one_run_whatever_steps_would_do():
    spec = Spec("dense", "resnet32-cifar10")
    masks = [
        Spec("mask", spec.network, 0, (("criterion", "snip"), ("sparsity", 0.9), *options), spec)
        for options in ((), (("lr", 1.0),), (("schedule", "single"), ("weight_decay", 0.0)))
    ]
    assert len({SMOKE.run(mask, 0).key for mask in masks}) == 1


def test_a_search_is_the_packages_own(smoke):
    run = search(eta=0.9)
    model = digits_net()
    model.load_state_dict(load_file(smoke / "checkpoints" / f"{run.source.key}.safetensors"))
    settings = SearchSettings(epochs=2, batch_size=128, normalization="recalibrate", eta=0.9)
    own = Search(model, *digits(), settings)
    own.begin()
    epochs = [record for record in own.run() if record["kind"] == "epoch"]
    result = Results(smoke).get(run)
    assert [e["test_accuracy"] for e in result["epochs"]] == [e["test_accuracy"] for e in epochs]
    assert result["overlap"] == epochs[-1]["overlap"] < 1


def test_fine_tuning_and_criteria_take_up_the_searched_mask(smoke):
    results, workshop = Results(smoke), Workshop(smoke)
    finetune = next(r for r in runs_of(["fig8"], SMOKE, 1) if r.kind == "finetune")
    assert results.get(finetune)["sparsity_masked"] == results.get(finetune.source)["sparsity_masked"]
    magnitude = next(r for r in runs_of(["fig4"], SMOKE, 1) if r.kind == "mask")
    assert dict(magnitude.options)["criterion"] == "magnitude"
    model = workshop.masked_network(magnitude.source)
    *searched, _ = runs.masked_layers(model).values()
    weight = torch.cat([layer.weight.detach().abs().flatten() for layer in searched])
    mask = torch.cat([layer.mask.flatten() for layer in searched])
    largest = torch.zeros_like(mask)
    largest[weight.argsort(descending=True)[: int(mask.sum())]] = True
    agreeing = (largest == mask).double().mean().item()
    assert results.get(magnitude)["overlap"] == pytest.approx(agreeing) and agreeing < 1
    kept = sum(layer.num_kept for layer in runs.masked_layers(model).values())
    weights = sum(layer.weight.numel() for layer in runs.masked_layers(model).values())
    assert 1 - kept / weights == pytest.approx(results.get(magnitude.source)["sparsity_overall"])


def test_finished_runs_are_never_made_again(copy, made):
    before = (copy / "results.jsonl").read_bytes()
    code, out, _ = smoke_command("all", copy)
    assert code == 0 and not made and "report.md" in out
    assert (copy / "results.jsonl").read_bytes() == before


def test_half_a_line_is_dropped_and_its_run_made_again(copy, made):
    path = copy / "results.jsonl"
    *whole, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + last[:-20])
    code, _, err = smoke_command("all", copy)
    assert code == 0 and "half a line" in err
    (run,) = made
    *kept, again = path.read_bytes().splitlines(keepends=True)
    assert kept == whole
    old, new = json.loads(last), json.loads(again)
    assert run.key == old["key"]
    times = ("seconds", "epochs", "threads")
    assert {k: v for k, v in new.items() if k not in times} == {
        k: v for k, v in old.items() if k not in times
    }


def test_only_one_of_two_processes_drops_half_a_line(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"key": "ha')
    first, second = Results(tmp_path), Results(tmp_path)
    for key, results in (("a", first), ("b", second), ("c", first)):
        results.add({"key": key, "configuration": {}, "seconds": 1.0})
    assert [result["key"] for result in Results(tmp_path).values()] == ["a", "b", "c"]


def test_two_processes_may_keep_the_same_checkpoint(tmp_path):
    run, tensors = runs_of(["table6"], SMOKE, 1)[0].lineage[-1], {"weight": torch.zeros(1000)}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: Workshop(tmp_path).keep(run, tensors), range(100)))
    assert torch.equal(Workshop(tmp_path).kept(run)["weight"], tensors["weight"])
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_lost_checkpoints_are_made_again_without_a_second_line(copy, made):
    run = search()
    path = copy / "results.jsonl"
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["key"] != run.key]
    path.write_text("\n".join(lines) + "\n")
    shutil.rmtree(copy / "checkpoints")
    code, _, err = smoke_command("table8", copy)
    assert code == 0, err
    assert made == [run.source, run]
    assert len(path.read_text().splitlines()) == len(lines) + 1


def test_what_starts_from_a_run_that_comes_out_otherwise_is_refused(copy, made):
    """As on another processor, where all that follows would be of another network."""
    run = search()
    path = copy / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["accuracy"] = 0.5 if line["key"] == run.source.key else line.get("accuracy")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line["key"] != run.key))
    shutil.rmtree(copy / "checkpoints")
    before = path.read_text()
    for _ in range(2):
        code, _, err = smoke_command("table8", copy)
        assert code == 2 and "must come out as in" in err and "50.00%, got" in err
    assert made == [run.source, run.source] and path.read_text() == before


def test_an_interruption_keeps_what_has_ended(tmp_path, monkeypatch):
    make = Workshop.make

    def interrupted(workshop, run):
        if run.kind != "train":
            raise KeyboardInterrupt
        return make(workshop, run)

    monkeypatch.setattr(Workshop, "make", interrupted)
    code, _, err = smoke_command("table7", tmp_path)
    assert code == 130 and "stopped" in err
    assert [result["configuration"]["kind"] for result in Results(tmp_path).values()] == ["train"]


def test_processes_do_what_one_does(smoke, tmp_path, undrawn):
    code, _, err = smoke_command("table7", tmp_path, "--jobs", "2")
    assert code == 0, err
    single, several = Results(smoke), Results(tmp_path)
    assert len(several) == 5
    for result in several.values():
        assert result["accuracy"] == single._by_key[result["key"]]["accuracy"]


def test_what_goes_wrong_in_a_process_is_told(copy):
    run = search()
    path = copy / "results.jsonl"
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["key"] != run.key]
    path.write_text("\n".join(lines) + "\n")
    (copy / "checkpoints" / f"{run.source.key}.safetensors").write_bytes(b"damaged")
    code, _, err = smoke_command("table7", copy, "--jobs", "2")
    assert code == 2 and "must be a whole safetensors file" in err and "Traceback" not in err
    assert path.read_text().splitlines() == lines


OF_A_LONG_RUN = """
import multiprocessing, os, pathlib, sys, time
from benchmarks.paper import execute

def long_run(workshop, run):
    pathlib.Path(run).write_text(str(os.getpid()))
    time.sleep(600)

execute.Workshop.make = long_run
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=execute._serve, args=(there, pathlib.Path(), "cpu", 1)).start()
    here.send(sys.argv[1])
    time.sleep(600)
"""


def test_no_run_outlives_the_process_that_asked_for_it(tmp_path):
    script, begun = tmp_path / "script.py", tmp_path / "begun"
    script.write_text(OF_A_LONG_RUN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    asks = subprocess.Popen([sys.executable, script, begun], env=environment)
    try:
        until(lambda: begun.is_file() and begun.read_text())
    finally:
        asks.kill()
        asks.wait()
    until(lambda: not is_alive(int(begun.read_text())))


def is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_nothing_starts_that_would_end_too_late(tmp_path, made):
    code, out, err = smoke_command("table7", tmp_path, "--minutes", "0")
    assert code == 0 and not made and not list(Results(tmp_path).values())
    assert "no time for 5 runs" in err and "not run" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["table10"], "invalid choice: 'table10'"),
        (["table1", "--scale", "huge"], "invalid choice: 'huge'"),
        (["table1", "--seeds", "0"], "must be at least 1, got 0"),
        (["table1", "--jobs", "-1"], "must be at least 1, got -1"),
    ],
)
def test_unknown_words_are_refused(arguments, sentence):
    code, _, err = command(*arguments)
    assert code == 2 and sentence in err


def test_a_damaged_line_is_named(copy):
    path = copy / "results.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-20], *lines[2:]]) + "\n")
    before = path.read_bytes()
    code, _, err = smoke_command("report", copy)
    assert code == 2 and f"{path} must hold a result on each line, got line 2" in err
    assert path.read_bytes() == before


@pytest.mark.parametrize("owner", ["other", None])
def test_a_checkpoint_of_another_network_is_named(copy, owner):
    run = search(lr=0.05)
    path = copy / "checkpoints" / f"{run.source.key}.safetensors"
    weights = load_file(path) if owner else digits_net().features.state_dict()
    save_file(weights, path, {"run": owner or run.source.key})
    with pytest.raises(ValueError, match=r"checkpoint .*safetensors must (be of the run|have the names)"):
        Workshop(copy).make(run)


def test_missing_data_are_named_and_finished_runs_kept(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("JACKPOT_DATA", str(tmp_path))
    runs.load.cache_clear()
    before = (copy / "results.jsonl").read_bytes()
    code, _, err = command("table1", "--scale", "reduced", "--output", str(copy))
    assert code == 2 and "JACKPOT_DATA" in err and "cifar10" in err and "Traceback" not in err
    assert (copy / "results.jsonl").read_bytes() == before


def test_every_network_data_set_and_option_is_known():
    for scale in SCALES.values():
        for run in runs_of(EXPERIMENTS, scale, 2):
            assert run.network in MODELS and run.data in DATA
            options = {k: v for k, v in run.options if k not in ("batches", "draws")}
            settings = TrainingSettings if run.kind in ("train", "finetune") else SearchSettings
            settings(**options, **({"epochs": run.epochs} if run.epochs else {}))


def facts(name: str, *options: str) -> set[tuple[object, ...]]:
    """Return network, epochs and options of an experiment's searches at full scale."""
    searches = [run for run in EXPERIMENTS[name].runs(FULL, 1) if run.kind == "search"]
    default = SearchSettings()
    return {
        (run.network, run.epochs, *(dict(run.options).get(o, getattr(default, o)) for o in options))
        for run in searches
    }


def test_full_scale_is_the_papers():
    cifar = {"vgg19-cifar10", "resnet32-cifar10"}
    assert facts("table1", "sparsity") == set(product(cifar, (10, 30), (0.9, 0.95)))
    hundred = {"vgg19-cifar100", "resnet32-cifar100"}
    assert facts("table2", "sparsity") == set(product(hundred, (10, 30), (0.9, 0.95)))
    assert facts("table3", "sparsity") == set(product({"resnet50"}, (30, 60), (0.8, 0.9)))
    light = {"mobilenet-v1", "efficientnet-b4"}
    assert facts("table4", "sparsity") == set(product(light, (30, 60), (0.8,)))
    methods = {("supermask", False), ("sr-popup", True), ("sr-popup", False)}
    large = {fact for fact in facts("table5", "method", "random_scores") if fact[0] == "resnet50"}
    assert large == {("resnet50", epochs, *method) for epochs in (30, 60) for method in methods}
    assert {fact[1] for fact in facts("table6")} == {10, 30, 60, 100, 300, 1000}
    ablated = facts("table7", "criterion", "schedule")
    assert ablated == {
        (network, 30, *rest)
        for network in cifar
        for rest in (("random", "quartic"), ("magnitude", "constant"), ("magnitude", "quartic"))
    }
    assert {fact[2] for fact in facts("table8", "pairs")} == {"inverse", "random", "best"}
    assert {fact[2] for fact in facts("table9", "schedule")} == {"constant", "single", "inverse", "quartic"}
    assert {fact[2] for fact in facts("fig5", "criterion")} == {"magnitude", "snip", "grasp", "random"}
    for run in runs_of(EXPERIMENTS, FULL, 3):
        if run.kind == "train":
            assert (run.epochs, run.images, run.seed) == (160, None, 0)
        elif run.kind == "search" and "method" not in dict(run.options):
            settings = SearchSettings(**dict(run.options))
            decay = 1e-4 if run.data.startswith("imagenet") else 5e-4
            assert (settings.lr, settings.batch_size, settings.weight_decay) == (0.1, 256, decay)
            assert run.seed == 0 or run.data.startswith("cifar")


def test_each_row_of_the_papers_own_methods_is_run():
    own = {
        "dense",
        "Jackpot (Ours)",
        "SR-popup (Ours)",
        "Zhou et al.",
        "Edge-popup",
        "starting mask",
        "Top-1 acc.",
    }
    for name, quoted in TABLES.items():
        rows = [row for row in EXPERIMENTS[name].rows if row.quoted]
        assert [(row.group, row.label, row.cost) for row in rows] == [row[:3] for row in quoted.rows]
        for row in rows:
            assert bool(row.cells) == (row.label in own), row


def test_restriction_is_paired():
    for row in EXPERIMENTS["restriction"].rows:
        for run, minus in row.cells[2].runs(FULL, 3):
            assert dict(minus.options) == {**dict(run.options), "schedule": "constant"}
            assert replace(minus, options=run.options) == run
        assert len(row.cells[2].runs(FULL, 3)) == 3
    told = {(row.label, row.cost) for row in EXPERIMENTS["restriction"].rows if row.cells[2].runs(REDUCED, 3)}
    assert told == set(product(("90%", "95%"), ("10 (S)", "30 (S)")))


def test_reduced_scale_covers_what_it_must():
    def own_rows(name):
        rows = [row for row in EXPERIMENTS[name].rows if row.cells]
        return [row for row in rows if any(cell and cell.runs(REDUCED, 3) for cell in row.cells)]

    must = {"table1": 8, "table7": 2, "table8": 2, "table9": 2, "fig5": 4, "fig9": 3}
    for name, rows in must.items():
        assert len(own_rows(name)) == rows, name
        for row in own_rows(name):
            if row.label != "dense":
                assert all(
                    len(cell.runs(REDUCED, 3)) == 3 for cell in row.cells if cell and cell.runs(REDUCED, 3)
                )
    for name in ("restriction", "table6", "fig2", "fig6"):
        assert own_rows(name), name
    for name in ("table2", "table3", "table4", "fig1"):
        assert not own_rows(name), name
    made = runs_of(EXPERIMENTS, REDUCED, 3)
    assert {run.network for run in made if run.kind == "train"} == {
        "resnet20-cifar10",
        "vgg19-narrow-cifar10",
    }
    # Two hours on two cores; the runs of these 5.7 million took 190 minutes in sum, two at a time.
    assert sum(map(execute.num_images, runs_of(must, REDUCED, 3))) < 6_500_000


@pytest.mark.parametrize(
    ("name", "group", "method", "cost", "values"),
    [
        ("table1", "VGGNet-19", "Jackpot (Ours)", "10 (S)", ("93.70±0.12", "93.54±0.17")),
        ("table1", "ResNet-32", "OBD", "160 (T)", ("94.17", "93.29")),
        ("table2", "ResNet-32", "Jackpot (Ours)", "30 (S)", ("72.68±0.13", "70.01±0.14")),
        ("table2", "VGGNet-19", "GraSP", "160 (T)", ("71.07", "70.1")),
        ("table3", "90%", "Jackpot (Ours)", "60 (S)", ("73.04", "91.34")),
        ("table3", "80%", "RigL", "100 (T)", ("74.60", "-")),
        ("table4", "EfficientNet-B4", "Jackpot (Ours)", "30 (S)", ("76.26", "93.14")),
        ("table5", "ResNet-50", "Zhou et al.", "60 (S)", ("68.40", "88.03")),
        ("table6", "ResNet-32", "Jackpot (Ours)", "1000 (S)", ("94.43±0.14", "94.1")),
        ("table7", "ResNet-32", "Top-1 acc.", "30 (S)", ("94.01±0.11", "93.69±0.07", "94.30±0.07")),
        ("table8", "ResNet-32", "Top-1 acc.", "30 (S)", ("93.13±0.12", "93.84±0.08", "94.30±0.07")),
        ("table9", "ResNet-32", "Top-1 acc.", "30 (S)", ("93.13±0.12", "93.44±0.08", "93.51±0.14")),
    ],
)
def test_papers_values(name, group, method, cost, values):
    assert TABLES[name].row(group, method, cost).values == values


def test_slips_of_the_paper_are_marked(tmp_path):
    header, (line, *_) = table("table9", Findings(Results(tmp_path), FULL, 3))
    cells = dict(zip(header, line, strict=True))
    assert cells["paper: Constant"] == "93.13±0.12 †" and cells["paper: Ours"] == "93.51±0.14 †"
    assert cells["paper: Inverse"] == "93.44±0.08" and cells["Constant"] == "not run"
    page, _ = write_report(Results(tmp_path), FULL, 3)
    for (_, column), slip in SLIPS.items():
        assert f"† The paper's {column} {slip}." in page.read_text()


@pytest.fixture
def told(tmp_path):
    """Made-up results at 90 % and 30 epochs: SR-popup with three seeds, warm edge-popup with two."""
    row = next(r for r in EXPERIMENTS["restriction"].rows if (r.label, r.cost) == ("90%", "30 (S)"))
    ours, free = (0.91, 0.93, 0.92), (0.90, 0.90)
    results = Results(tmp_path)
    pairs = row.cells[2].runs(REDUCED, 3)
    for i, (accuracies, seconds) in enumerate(((ours, 10.0), (free, 20.0))):
        for pair, accuracy in zip(pairs, accuracies, strict=False):
            run = pair[i]
            shared = {"device": "cpu", "threads": 1, "commit": "0", "versions": {}, "seed": run.seed}
            course = [{"epoch": 1, "train_loss": 0.5, "train_accuracy": 0.8, "seconds": 1.0}]
            measured = {"accuracy": accuracy, "sparsity_masked": 0.9, "sparsity_overall": 0.8775}
            measured |= {"epochs": course}
            line = {"key": run.key, "configuration": run.configuration, "seconds": seconds}
            results.add({**line, **shared, **measured})
    return Results(tmp_path)


def test_differences_are_those_of_the_seeds_that_both_have(told):
    header, lines = table("restriction", Findings(told, REDUCED, 3))
    line = next(line for line in lines if line[:3] == ["ResNet-32", "90%", "30 (S)"])
    cells = dict(zip(header, line, strict=True))
    assert cells["SR-popup"] == f"{mean((91, 93, 92)):.2f} ± {stdev((91, 93, 92)):.2f}"
    assert cells["edge-popup, warm"] == "90.00 ± 0.00 (2 of 3 seeds)"
    assert cells["SR − edge-popup"] == f"+2.00 ± {stdev((1, 3)):.2f} (2 of 3 seeds)"
    assert cells["authors' rule"] == cells["SR − authors' rule"] == "not run"
    assert cells["seeds"] == "3" and cells["epochs"] == "5"
    assert cells["seconds a run"] == f"{(3 * 10 + 2 * 20) / 5:.1f}"
    assert cells["sparsity, masked / all layers"] == "90.00 / 87.75"


def test_report_of_few_runs_says_what_was_not_run(told):
    text, page = write_report(told, REDUCED, 3)
    written = text.read_text()
    assert "## Table 2" in written and written.count("Not run at this scale.") >= 5
    assert "resnet20-cifar10 for resnet32-cifar10" in written
    assert "+2.00 ± 1.41 (2 of 3 seeds)" in page.read_text()
    assert (told.folder / "restriction.png").is_file() and not (told.folder / "fig6.png").exists()


def test_the_best_epoch_on_the_test_set_is_labelled(smoke):
    header, lines = table("table8", Findings(Results(smoke), SMOKE, 1))
    cell = dict(zip(header, lines[0], strict=True))["Ours"]
    result = Results(smoke).get(search())
    assert cell == f"{100 * result['accuracy']:.2f} (best on test {100 * result['best_on_test']:.2f})"


def test_commit_can_be_told_where_git_cannot(monkeypatch):
    monkeypatch.setenv("JACKPOT_COMMIT", "abc")
    assert runs.commit.__wrapped__() == "abc"
    monkeypatch.delenv("JACKPOT_COMMIT")
    monkeypatch.setenv("PATH", "/nowhere")
    assert runs.commit.__wrapped__() == "unknown"


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_commit_tells_of_changes_but_not_of_results(tmp_path, monkeypatch):
    monkeypatch.delenv("JACKPOT_COMMIT", raising=False)
    monkeypatch.setattr(runs, "_ROOT", tmp_path)
    assert runs.commit.__wrapped__() == "unknown"
    files = [tmp_path / "source.py", tmp_path / "benchmarks" / "results" / "results.jsonl"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for arguments in (["init"], ["add", "."], [*who, "commit", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)
    clean = runs.commit.__wrapped__()
    assert re.fullmatch(r"[0-9a-f]{40}", clean)
    files[1].write_text("2")
    assert runs.commit.__wrapped__() == clean
    files[0].write_text("2")
    assert runs.commit.__wrapped__() == f"{clean}-dirty"
