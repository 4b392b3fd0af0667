"""``score_update_``: SGD on the scores of all layers, with the candidates of the next swap."""

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.baselines import compiled_sgd, exact_step, fused_sgd
from benchmarks.checks import require_close, require_same
from benchmarks.harness import contest
from benchmarks.searches import Search
from jackpot_kernels.ops.score_update import score_update_
from jackpot_kernels.ops.swap import new_workspace, swap_


def bench_score_update(benchmark: BenchmarkFixture, search: Search, budget_s: float) -> None:
    """Against fused SGD, which looks for no candidates and does not ask whether gradients are finite."""
    ours, expected, fused, compiled = (search.state() for _ in range(4))
    workspace = new_workspace(ours.scores)

    def update() -> None:
        score_update_(
            ours.scores,
            ours.momenta,
            search.gradients,
            ours.masks,
            ours.hyper,
            ours.control,
            workspace=workspace,
        )

    def swap() -> None:
        swap_(
            ours.scores,
            ours.masks,
            ours.num_kept,
            ours.schedule,
            ours.control,
            weights=ours.weights,
            effective=ours.effective,
            workspace=workspace,
        )

    def prepare() -> None:
        swap()
        search.draw_gradients()

    others = {
        "fused SGD": fused_sgd(fused, search.gradients),
        "compiled SGD": compiled_sgd(compiled, search.gradients),
    }
    search.draw_gradients()
    update()
    exact_step(expected, search.gradients)
    require_same("scores", ours.scores, expected.scores)
    require_same("momenta", ours.momenta, expected.momenta)
    for sgd in others.values():
        sgd()
    for state in (fused, compiled):
        require_close("scores", state.scores, expected.scores)
    contest(benchmark, update, others, budget_s=budget_s, prepare=prepare)
