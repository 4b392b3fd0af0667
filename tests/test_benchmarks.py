"""The benchmarks themselves: fair turns, checks that can fail, and a report that hides nothing."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    baselines,
    bench_score_update,
    bench_search_step,
    bench_state,
    bench_threshold,
    bench_training_step,
    harness,
    report,
)
from benchmarks.checks import require_same_state
from benchmarks.searches import Search
from benchmarks.shapes import NETWORKS, num_weights
from jackpot_kernels import MaskedLinear, reference

ROOT = Path(__file__).parents[1]


class Benchmark:
    """What the benchmarks use of pytest-benchmark's fixture, without its clock."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(
        self,
        target: Callable[[], object],
        *,
        rounds: int,
        iterations: int,
        setup: Callable[[], object] = lambda: None,
    ) -> None:
        for _ in range(rounds):
            setup()
            target()
            self.rounds += 1


@pytest.fixture
def clockless() -> Benchmark:
    return Benchmark()


@pytest.fixture(scope="module")
def mid_search() -> Search:
    return Search([(128, 64, 3, 3), (10, 128)])  # large enough for every step to swap


@pytest.fixture
def search(mid_search: Search, monkeypatch: pytest.MonkeyPatch) -> Search:
    # What is compiled is checked like what is not, and compiling takes longer than all else here.
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function or (lambda f: f))
    return mid_search.fork()


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all benchmarks on tiny networks and return the folder of the report."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--output", str(folder)]
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (written,) = folder.iterdir()
    assert (written / "table.md").read_text() in run.stdout
    return written


def test_networks_have_the_papers_weights():
    totals = {name: (len(shapes), num_weights(shapes)) for name, shapes in NETWORKS.items()}
    assert totals == {
        "ResNet-32 x2": (32, 1_845_344),
        "VGG-19": (17, 20_024_000),
        "ResNet-50": (54, 25_502_912),
    }


def test_contenders_take_turns_from_cold_caches(clockless, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(harness, "flush_caches", lambda: calls.append("flush"))
    others = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    harness.contest(
        clockless, lambda: calls.append("ours"), others, budget_s=0, prepare=lambda: calls.append("prepare")
    )
    turn = ["prepare", "flush", "a", "flush", "b", "flush", "ours"]
    assert calls == turn * (1 + harness.MIN_ROUNDS)
    assert {name: len(times) for name, times in clockless.extra_info["others"].items()} == {
        "a": harness.MIN_ROUNDS,
        "b": harness.MIN_ROUNDS,
    }


def test_flush_writes_more_than_the_caches_hold():
    ballast = harness._ballast()
    before = ballast.clone()
    harness.flush_caches()
    assert ballast.nbytes >= max(64 * 2**20, 2 * harness._largest_cache())
    assert bool((ballast != before).all())


def test_ratio_needs_times():
    assert harness.ratio([3.0, 1.0, 2.0], [0.5, 4.0, 0.1]) == 4
    with pytest.raises(ValueError, match="on both sides, got 0 and 1"):
        harness.ratio([], [1.0])


def test_gradients_move_masks_in_the_middle_of_a_search(search):
    before = search.state()
    search.draw_gradients()
    search.optimizer.step()
    assert baselines.exact_step(before, search.gradients)[:, 1].sum() > 0


def test_forks_go_on_alike(search):
    twin = search.fork()
    for each in (search, twin):
        each.draw_gradients()
        each.optimizer.step()
    require_same_state(twin.state(), search.state())


def spoil_scores(search: Search) -> None:
    scores = search.layers[0].scores.detach().view(-1)
    scores[0] = torch.nextafter(scores[0], torch.tensor(torch.inf))


def spoil_effective_weight(search: Search) -> None:
    # Behind the version counter: a write that it saw would have the layer build the tensor anew.
    search.layers[0].effective_weight().data.view(-1)[0] += 1


@pytest.mark.parametrize(
    ("run", "spoil", "message"),
    [
        (bench_search_step.bench_search_step, spoil_scores, "scores 0 must equal the reference"),
        (bench_search_step.bench_search_step, spoil_effective_weight, "effective 0 must equal the reference"),
        (bench_state.bench_state, spoil_effective_weight, "effective weight 0 must equal the reference"),
    ],
)
def test_wrong_steps_of_ours_are_not_timed(clockless, search, monkeypatch, run, spoil, message):
    step = search.optimizer.step
    monkeypatch.setattr(search.optimizer, "step", lambda: (step(), spoil(search)))
    arguments = {"budget_s": 0.0} if run is bench_search_step.bench_search_step else {}
    with pytest.raises(AssertionError, match=message):
        run(clockless, search, **arguments)


@pytest.mark.parametrize(
    ("module", "function", "run", "message"),
    [
        (bench_search_step, "eager_step", bench_search_step.bench_search_step, "scores 0 must be close"),
        (bench_search_step, "compiled_step", bench_search_step.bench_search_step, "scores 0 must be close"),
        (bench_search_step, "authors_step", bench_search_step.bench_search_step, "scores 0 must be close"),
        (
            bench_search_step,
            "fused_sgd",
            bench_search_step.bench_search_step_to_sgd,
            "scores 0 must be close",
        ),
        (bench_search_step, "compiled_sgd", bench_search_step.bench_search_step_to_sgd, "scores 0 must be"),
        (bench_score_update, "fused_sgd", bench_score_update.bench_score_update, "scores 0 must be close"),
        (bench_score_update, "compiled_sgd", bench_score_update.bench_score_update, "scores 0 must be close"),
    ],
)
def test_idle_baselines_are_not_timed(clockless, search, monkeypatch, module, function, run, message):
    monkeypatch.setattr(module, function, lambda state, gradients: lambda: None)
    with pytest.raises(AssertionError, match=message):
        run(clockless, search, 0.0)


def test_authors_step_must_swap(clockless, search, monkeypatch):
    monkeypatch.setattr(baselines, "_authors_swap", lambda *_: None)
    with pytest.raises(AssertionError, match="effective weights must differ in few"):
        bench_search_step.bench_search_step(clockless, search, 0.0)


def test_wrong_update_is_not_timed(clockless, search, monkeypatch):
    update = bench_score_update.score_update_

    def wrong(scores: list[Tensor], momenta: list[Tensor], *others: Any, **options: Any) -> None:
        update(scores, momenta, *others, **options)
        momenta[0].add_(1)

    monkeypatch.setattr(bench_score_update, "score_update_", wrong)
    with pytest.raises(AssertionError, match="momenta 0 must equal the reference"):
        bench_score_update.bench_score_update(clockless, search, 0.0)


def test_wrong_threshold_is_not_timed(clockless, search, monkeypatch):
    monkeypatch.setattr(bench_threshold, "threshold", lambda v, k: reference.threshold(v, k - 1))
    with pytest.raises(AssertionError, match="threshold 0 must equal the reference"):
        bench_threshold.bench_threshold(clockless, search, 0.0)


def test_wrong_partition_is_not_timed(clockless, search, monkeypatch):
    monkeypatch.setattr(bench_threshold.np, "partition", lambda array, place: array)
    with pytest.raises(AssertionError, match="must find the thresholds"):
        bench_threshold.bench_threshold(clockless, search, 0.0)


def test_wrong_layer_is_not_timed(clockless, monkeypatch):
    forward = MaskedLinear.forward
    monkeypatch.setattr(MaskedLinear, "forward", lambda layer, x: forward(layer, x) * 1.01)
    with pytest.raises(AssertionError, match="output 0 must be close"):
        bench_training_step.bench_training_step(clockless, "ResNet-32 x2", quick=True, budget_s=0.0)


def test_right_contenders_are_timed(clockless, search):
    bench_search_step.bench_search_step(clockless, search, 0.0)
    assert set(clockless.extra_info["others"]) == {"eager", "compile", "authors"}
    assert clockless.extra_info["swaps proposed"] > 0


def test_rehearsal_reports_every_figure(rehearsal):
    assert {file.name for file in rehearsal.iterdir()} == {
        "results.json",
        "search_step.png",
        "table.md",
        "targets.png",
    }
    table = (rehearsal / "table.md").read_text()
    titles = [*(figure.title for figure in report.FIGURES), *(title for title, _, _ in report.BYTES)]
    for title in titles:
        assert f"| {title} |" in table
    for fact in ("processor", "threads", "commit", "torch", "command", "layers scanned again, tiny"):
        assert f"\n- {fact}: " in table
    state = next(line for line in table.splitlines() if line.startswith("| state, bytes per weight"))
    assert 16.125 <= float(state.split("|")[3]) <= 16.25


def test_missing_figures_are_errors(rehearsal, tmp_path):
    run = json.loads((rehearsal / "results.json").read_text())
    for broken, message in [
        (run | {"benchmarks": run["benchmarks"][1:]}, "results must hold"),
        (run | {"benchmarks": []}, "results must hold"),
        (run | {"benchmarks": [_without_times(b) for b in run["benchmarks"]]}, "two rounds at least"),
        (run | {"benchmarks": [_without_others(b) for b in run["benchmarks"]]}, "results must hold"),
    ]:
        raw = tmp_path / "raw.json"
        raw.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            report.write_report(raw, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def _without_times(benchmark: dict[str, Any]) -> dict[str, Any]:
    return benchmark | {"stats": benchmark["stats"] | {"data": []}}


def _without_others(benchmark: dict[str, Any]) -> dict[str, Any]:
    return benchmark | {"extra_info": {k: v for k, v in benchmark["extra_info"].items() if k != "others"}}


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (">= 40", 40.0, True),
        (">= 40", 39.9, False),
        ("<= 1.4", 1.4, True),
        ("<= 1.4", 1.41, False),
        ("", 0.1, True),
    ],
)
def test_rows_say_when_a_target_is_missed(target, value, met):
    row = report.Row("figure", target, "network", value, (value, value))
    assert ("**not met**" not in str(row)) == met
    assert str(row).startswith(f"{value:g} ")


def test_rows_say_when_others_computed_meanwhile(rehearsal):
    run = json.loads((rehearsal / "results.json").read_text())
    for busy, disturbed in ((2 * report.DISTURBANCE, True), (report.DISTURBANCE / 2, False), (None, False)):
        for benchmark in run["benchmarks"]:
            benchmark["extra_info"]["disturbance"] = busy
        rows = report.make_rows(report.read_entries(run), ["tiny"])
        assert [row.disturbed for row in rows if row.quartiles] == [disturbed] * len(report.FIGURES)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_other_programs_are_noticed(clockless):
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            harness.contest(clockless, lambda: time.sleep(0.2), {"idle": lambda: None}, budget_s=0)
        finally:
            other.kill()
    assert clockless.extra_info["disturbance"] > report.DISTURBANCE


def test_the_fastest_of_the_contenders_counts():
    seconds = {"ours": [1.0, 2.0, 3.0], "fused SGD": [4.0, 4.0, 4.0], "compiled SGD": [1.0, 1.0, 9.0]}
    assert report.fastest(report.Entry("bench", "net", seconds, {}), report.SGD) == [1.0, 1.0, 9.0]
