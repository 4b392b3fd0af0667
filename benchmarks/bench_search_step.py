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
from benchmarks.harness import contest
from benchmarks.searches import Search, State
from jackpot_kernels import reference

# Where the baselines round otherwise than the definition, scores near the threshold may change sides.
AGREEMENT = 0.999


def bench_search_step(benchmark: BenchmarkFixture, search: Search, budget_s: float) -> None:
    """Against the reference, eager and compiled, and the authors' sequence of operations."""
    expected, eager, compiled, authors = (search.state() for _ in range(4))
    others = {
        "eager": eager_step(eager, search.gradients),
        "compile": compiled_step(compiled, search.gradients),
        "authors": authors_step(authors, search.gradients),
    }
    for _ in range(2):  # without the last step's candidates, and with them
        search.draw_gradients()
        statistics = exact_step(expected, search.gradients)
        search.optimizer.step()
        require_same_state(search.state(), expected)
        require_same_statistics(search.optimizer._stats, statistics)
        for step in others.values():
            step()
    for state in (eager, compiled, authors):
        require_similar_state(state, expected)
    _contest_of_steps(benchmark, search, others, 3 * budget_s)


def bench_search_step_to_sgd(benchmark: BenchmarkFixture, search: Search, budget_s: float) -> None:
    """Against a pure update of the same scores by fused SGD, which selects and swaps nothing."""
    fused, compiled = search.state(), search.state()
    others = {"fused": fused_sgd(fused, search.gradients), "compile": compiled_sgd(compiled, search.gradients)}
    for _ in range(2):
        search.draw_gradients()
        search.optimizer.step()
        for update in others.values():
            update()
    for state in (fused, compiled):
        require_close("scores", state.scores, search.state().scores)
    _contest_of_steps(benchmark, search, others, budget_s)


def _contest_of_steps(
    benchmark: BenchmarkFixture, search: Search, others: dict, budget_s: float
) -> None:
    statistics: list[Tensor] = []

    def prepare() -> None:
        statistics.append(search.optimizer._stats)
        search.draw_gradients()

    contest(benchmark, search.optimizer.step, others, budget_s=budget_s, prepare=prepare)
    columns = torch.stack(statistics[2:]).double()  # [rounds, L, 5]
    benchmark.extra_info["proposed per step"] = columns[..., 0].sum(1).mean().item()
    benchmark.extra_info["cold layers"] = columns[..., 4].mean().item()


def require_same_state(got: State, expected: State) -> None:
    """Check that all a step writes is the same, bit for bit."""
    for name in ("scores", "momenta", "masks", "effective"):
        require_same(name, getattr(got, name), getattr(expected, name))


def require_same(name: str, got: list[Tensor], expected: list[Tensor]) -> None:
    for layer, (a, b) in enumerate(zip(got, expected, strict=True)):
        if not torch.equal(a, b):
            raise AssertionError(f"{name} of layer {layer} must equal those of the reference bit for bit")
