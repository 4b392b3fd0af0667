"""The whole search step, ``SRPopup.step``: update, selection, swap and effective weights of all layers."""

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.baselines import (
    authors_step,
    compiled_sgd,
    compiled_step,
    eager_step,
    exact_step,
    fused_sgd,
)
from benchmarks.checks import require_close, require_same_state, require_same_statistics, require_same_swaps
from benchmarks.harness import TWINS, contest, in_turn
from benchmarks.searches import Search


def bench_search_step(benchmark: BenchmarkFixture, search: Search, budget_s: float) -> None:
    """Against the reference, eager and compiled, and the authors' sequence of operations."""
    before, expected, eager, compiled, authors = (search.state() for _ in range(5))
    others = {
        "eager": eager_step(eager, search.gradients),
        "compile": compiled_step(compiled, search.gradients),
        "authors": authors_step(authors, search.gradients),
    }
    for _ in range(2):  # without candidates from the step before, and with them
        search.draw_gradients()
        search.optimizer.step()
        statistics = exact_step(expected, search.gradients)
        require_same_state(search.state(), expected)
        require_same_statistics(search.optimizer._stats, statistics)
        for step in others.values():
            step()
    for state in (eager, compiled, authors):
        require_same_swaps(state, expected, before)
    rows: list[Tensor] = []

    def prepare() -> None:
        rows.append(search.optimizer._stats.clone())
        search.draw_gradients()

    contest(benchmark, search.optimizer.step, others, budget_s=3 * budget_s, prepare=prepare)
    timed = torch.stack(rows[2:]).double()  # [R, L, 5]
    benchmark.extra_info["swaps proposed"] = timed[..., 0].sum(1).mean().item()
    benchmark.extra_info["layers scanned again"] = timed[..., 4].mean().item()


def bench_search_step_to_sgd(benchmark: BenchmarkFixture, search: Search, budget_s: float) -> None:
    """Against a mere update of the same scores, which selects and swaps nothing."""
    twins = [search, *(search.fork() for _ in range(TWINS - 1))]
    fused, compiled = [twin.state() for twin in twins], search.state()
    updates = [fused_sgd(state, twin.gradients) for state, twin in zip(fused, twins, strict=True)]
    compiled_update = compiled_sgd(compiled, search.gradients)
    for twin in twins:
        twin.draw_gradients()
    compiled_update()
    steps = in_turn([twin.optimizer.step for twin in twins])
    others = {"fused SGD": in_turn(updates), "compiled SGD": compiled_update}
    for state, twin in zip((*fused, compiled), (*twins, search), strict=True):
        require_close("scores", state.scores, twin.state().scores)
    draw = in_turn([twin.draw_gradients for twin in twins])
    contest(benchmark, steps, others, budget_s=2 * budget_s, prepare=draw)
