"""``swap_``: choosing and making the swaps of all layers, among the candidates that the update left."""

from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.checks import require_same, require_same_statistics
from benchmarks.harness import contest
from benchmarks.searches import Search
from jackpot_kernels import reference
from jackpot_kernels.ops.score_update import score_update_
from jackpot_kernels.ops.swap import new_workspace, swap_


def bench_swap(benchmark: BenchmarkFixture, search: Search, budget_s: float) -> None:
    """Against the reference, which sorts all scores; both swap after the same updates, step after step."""
    ours, eager = search.state(), search.state()
    workspace = new_workspace(ours.scores)

    def update() -> None:
        search.draw_gradients()
        score_update_(
            ours.scores,
            ours.momenta,
            search.gradients,
            ours.masks,
            ours.hyper,
            ours.control,
            workspace=workspace,
        )
        for copy, score in zip(eager.scores, ours.scores, strict=True):
            copy.copy_(score)
        eager.control.copy_(ours.control)

    def swap() -> Tensor:
        return swap_(
            ours.scores,
            ours.masks,
            ours.num_kept,
            ours.schedule,
            ours.control,
            weights=ours.weights,
            effective=ours.effective,
            workspace=workspace,
        )

    def eager_swap() -> Tensor:
        return reference.swap_(
            eager.scores,
            eager.masks,
            eager.num_kept,
            eager.schedule,
            eager.control,
            weights=eager.weights,
            effective=eager.effective,
        )

    update()
    require_same_statistics(swap(), eager_swap())
    require_same("masks", ours.masks, eager.masks)
    require_same("effective", ours.effective, eager.effective)
    contest(benchmark, swap, {"eager": eager_swap}, budget_s=budget_s, prepare=update)
