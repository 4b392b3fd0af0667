"""``effective_weight``: the weights of all layers under their masks, made afresh."""

from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.checks import require_same
from benchmarks.harness import contest
from benchmarks.searches import Search
from jackpot_kernels import reference
from jackpot_kernels.ops.effective_weight import effective_weight


def bench_effective_weight(benchmark: BenchmarkFixture, search: Search, budget_s: float) -> None:
    """Against the reference."""
    layers = [(layer.weight, layer.mask_words) for layer in search.layers]

    def make() -> list[Tensor]:
        return [effective_weight(weight, words) for weight, words in layers]

    def eager() -> list[Tensor]:
        return [reference.effective_weight(weight, words) for weight, words in layers]

    require_same("effective weight", make(), eager())
    contest(benchmark, make, {"eager": eager}, budget_s=budget_s)
