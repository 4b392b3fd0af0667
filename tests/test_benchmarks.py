"""The benchmarks themselves: fair turns, checks that can fail, and a report that hides nothing."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import (
    baselines,
    bench_cuda_search_step,
    bench_effective_weight,
    bench_pack_mask,
    bench_score_update,
    bench_search_step,
    bench_state,
    bench_swap,
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


def spoiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, but for the first element that it returns."""

    def wrong(*args: Any) -> Tensor:
        result = function(*args)
        first = result.view(-1)[0]
        first.copy_(first.logical_not() if result.dtype == torch.bool else first + 1)
        return result

    return wrong


@pytest.mark.parametrize(
    ("module", "function", "run", "message"),
    [
        (bench_pack_mask, "pack_mask", bench_pack_mask.bench_pack_mask, "words 0 must equal the reference"),
        (
            bench_pack_mask,
            "unpack_mask",
            bench_pack_mask.bench_unpack_mask,
            "mask 0 must equal the reference",
        ),
        (
            bench_effective_weight,
            "effective_weight",
            bench_effective_weight.bench_effective_weight,
            "effective weight 0 must equal the reference",
        ),
    ],
)
def test_wrong_masks_are_not_timed(clockless, search, monkeypatch, module, function, run, message):
    monkeypatch.setattr(module, function, spoiled(getattr(module, function)))
    with pytest.raises(AssertionError, match=message):
        run(clockless, search, 0.0)


@pytest.mark.parametrize(
    ("function", "run", "message"),
    [
        ("packbits", bench_pack_mask.bench_pack_mask, "must make the bytes of the reference's words"),
        ("unpackbits", bench_pack_mask.bench_unpack_mask, "must make the reference's mask"),
    ],
)
def test_wrong_bits_of_numpy_are_not_timed(clockless, search, monkeypatch, function, run, message):
    right = getattr(np, function)
    monkeypatch.setattr(bench_pack_mask.np, function, lambda array, **options: right(array, **options) ^ 1)
    with pytest.raises(AssertionError, match=message):
        run(clockless, search, 0.0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda masks, effective, stats: stats[0].add_(1), "statistics 0 must equal the reference"),
        (lambda masks, effective, stats: masks[1].bitwise_not_(), "masks 1 must equal the reference"),
        (lambda masks, effective, stats: effective[1].add_(1), "effective 1 must equal the reference"),
    ],
    ids=["statistics", "masks", "effective"],
)
def test_wrong_swaps_are_not_timed(clockless, search, monkeypatch, spoil, message):
    swap_ = bench_swap.swap_

    def wrong(scores: list[Tensor], masks: list[Tensor], *others: Any, **options: Any) -> Tensor:
        stats = swap_(scores, masks, *others, **options)
        spoil(masks, options["effective"], stats)
        return stats

    monkeypatch.setattr(bench_swap, "swap_", wrong)
    with pytest.raises(AssertionError, match=message):
        bench_swap.bench_swap(clockless, search, 0.0)


def test_swaps_are_timed_on_the_scores_of_every_step(clockless, search, monkeypatch):
    stats: dict[str, list[list[int]]] = {"ours": [], "eager": []}
    for name, module in (("ours", bench_swap), ("eager", reference)):
        swap_ = module.swap_

        def noted(
            *args: Any, name: str = name, swap_: Callable[..., Tensor] = swap_, **options: Any
        ) -> Tensor:
            result = swap_(*args, **options)
            stats[name].append(result[:, :4].flatten().tolist())
            return result

        monkeypatch.setattr(module, "swap_", noted)
    bench_swap.bench_swap(clockless, search, 0.0)
    assert stats["ours"] == stats["eager"] and len(stats["ours"]) == 2 + harness.MIN_ROUNDS
    assert len({tuple(row) for row in stats["ours"]}) == len(stats["ours"])
    assert all(row[1] > 0 for row in stats["ours"])


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


def test_table_of_a_gpu_leaves_blank_what_was_not_measured():
    table = bench_cuda_search_step.report({"a net": {"x": 1.5, "why": 2.0}, "another": {"x": 0.25, "z": 4.0}})
    assert [line.split() for line in table.splitlines()] == [
        ["a", "net", "another"],
        ["x", "1.5", "0.25"],
        ["why", "2"],
        ["z", "4"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_a_network_that_fails_on_a_gpu_takes_no_other_along(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(bench_cuda_search_step, "commit", lambda: "abc")
    options = argparse.Namespace(quick=False, output=tmp_path)

    calls = []

    def measure(network: str) -> dict[str, float]:
        calls.append(network)
        if network == "bad":
            raise RuntimeError("no room")
        return {"step s": 2.0}

    def compiled(network: str) -> dict[str, float]:
        calls.append(f"compiled {network}")
        if network == "odd":
            raise RuntimeError("no compiler")
        return {"compile s": 4.0}

    measures = {"kernels": measure, "compile": compiled}
    code = bench_cuda_search_step.measure_all("x", ["bad", "odd", "good"], measures, options, bandwidth=3.0)
    assert code == 1
    assert calls == ["bad", "odd", "good", "compiled odd", "compiled good"]
    told = capsys.readouterr()
    assert told.out.startswith("Some GPU, bandwidth 3\n") and "good" in told.out
    assert "RuntimeError: no room" in told.err and "bad, kernels is left out" in told.err
    assert "RuntimeError: no compiler" in told.err and "odd, compile is left out" in told.err
    record = json.loads((tmp_path / "some-gpu" / "x.json").read_text())
    assert record["results"] == {"odd": {"step s": 2.0}, "good": {"step s": 2.0, "compile s": 4.0}}
    assert record["commit"] == "abc" and record["bandwidth"] == 3.0


def test_a_contender_that_fails_on_a_gpu_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def fails() -> None:
        raise RuntimeError("not captured")

    assert bench_cuda_search_step.ready("torch.topk", lambda: fails) is None
    assert "torch.topk is left out: RuntimeError: not captured" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="not captured"):
        bench_cuda_search_step.ready("step", lambda: fails)


def on_the_cpu(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
    """Let contenders take turns here, each call as long as the next of ``seconds`` says."""

    def timed(call: Callable[[], object]) -> float:
        call()
        return seconds.pop(0)

    monkeypatch.setattr(bench_cuda_search_step, "timed", timed)
    monkeypatch.setattr(bench_cuda_search_step, "WARM_ROUNDS", 2)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))


def test_rounds_on_a_gpu_begin_with_some_that_do_not_count(monkeypatch):
    on_the_cpu(monkeypatch, [9.0] * 4 + [1.0, 4.0, 1.0, 5.0, 7.0, 6.0])
    calls: list[str] = []
    seconds = bench_cuda_search_step.take_turns(
        {"ours": lambda: calls.append("ours"), "other": lambda: calls.append("other")},
        3,
        prepare=lambda: calls.append("prepare"),
        afterwards={"ours": lambda: calls.append("after ours")},
    )
    assert calls == ["prepare", "ours", "after ours", "other"] * 5
    assert seconds == {"ours": [1.0, 1.0, 7.0], "other": [4.0, 5.0, 6.0]}
    averages = bench_cuda_search_step.averages(seconds)
    assert averages == {"ours s": 1.0, "ours mean s": 3.0, "other s": 5.0, "other mean s": 5.0}


def test_update_timed_on_a_gpu_emits_the_candidates_of_its_swap(monkeypatch):
    search = Search([(64, 64, 3, 3)])
    ours = bench_cuda_search_step.Ours(search.state(), search.gradients)
    scanned: list[int] = []

    def swap() -> None:
        ours.swap()
        scanned.append(int(ours.stats[0, 4]))

    on_the_cpu(monkeypatch, [1.0] * 22)
    ours.step()
    bench_cuda_search_step.take_turns(
        {"update": ours.update}, 20, prepare=search.draw_gradients, afterwards={"update": swap}
    )
    assert sum(scanned[2:]) <= 5
