"""``threshold``: the K-th ranked score of every layer."""

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.checks import require_same
from benchmarks.harness import contest
from benchmarks.searches import Search
from jackpot_kernels import reference
from jackpot_kernels.ops.threshold import threshold


def bench_threshold(benchmark: BenchmarkFixture, search: Search, budget_s: float) -> None:
    """Against ``np.partition`` layer by layer, which uses one thread and finds the value only."""
    state = search.state()
    scores, num_kept = state.scores, state.num_kept[:, 0].contiguous()
    arrays = [score.view(-1).numpy() for score in scores]
    places = [array.size - kept for array, kept in zip(arrays, num_kept.tolist(), strict=True)]

    def partition() -> list[np.float32]:
        return [np.partition(array, place)[place] for array, place in zip(arrays, places, strict=True)]

    expected = reference.threshold(scores, num_kept)
    require_same("threshold", threshold(scores, num_kept), expected)
    if partition() != expected[0].tolist():
        raise AssertionError("np.partition must find the thresholds of the reference, got others")
    contest(
        benchmark,
        lambda: threshold(scores, num_kept),
        {"np.partition": partition},
        budget_s=budget_s,
    )
