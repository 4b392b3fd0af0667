"""The search step on a GPU: ``python -m benchmarks.bench_cuda_search_step`` prints a table and stores it.

Times are medians of rounds in which all contenders take turns, each after the L2 cache was written over. CUDA
events stand around the replay of a graph, or the call of a contender that waits for the host. The floor
is the bytes that an update must move at the copy bandwidth measured in the same run.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.baselines import authors_step, compiled_step, eager_step, exact_step
from benchmarks.checks import require_same_state, require_same_swaps
from benchmarks.harness import facts
from benchmarks.searches import Search, State
from benchmarks.shapes import NETWORKS, TINY
from jackpot_kernels.ops.score_update import score_update_
from jackpot_kernels.ops.swap import new_workspace, swap_

# Gradient, weight, score and momentum read, score and momentum written, and a bit of the mask.
BYTES_PER_WEIGHT = 24.125
RESULTS = Path(__file__).parent / "results"

Call = Callable[[], object]


def to_device(state: State) -> State:
    values = (getattr(state, field.name) for field in fields(state))
    return State(*([t.cuda() for t in v] if isinstance(v, list) else v.cuda() for v in values))


@dataclass
class Ours:
    """Our step on a state; gradients are written where a graph finds them."""

    state: State
    gradients: list[Tensor]

    def __post_init__(self) -> None:
        self.workspace = new_workspace(self.state.scores)
        self.stats = torch.empty(0)

    def update(self) -> None:
        s = self.state
        score_update_(
            s.scores, s.momenta, self.gradients, s.masks, s.hyper, s.control, workspace=self.workspace
        )

    def step(self) -> None:
        s = self.state
        self.update()
        self.stats = swap_(
            s.scores,
            s.masks,
            s.num_kept,
            s.schedule,
            s.control,
            weights=s.weights,
            effective=s.effective,
            workspace=self.workspace,
        )


def graphed(call: Call) -> Call:
    """Return the replay of a graph of ``call``, which runs a few times first; nothing runs at the capture."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def sync_free_step(state: State, gradients: list[Tensor]) -> Call:
    """Return the step as PyTorch allows it without waiting for the host: a sort a layer, no ``nonzero``.

    Masks are bool, so that nothing is packed.
    """
    masks = [weight != 0 for weight in state.effective]
    kept = state.num_kept[:, 0].tolist()

    def step() -> None:
        state.control[0] += 1
        rate = state.schedule[:, 0].gather(0, state.control[:1] - 1)
        for i, (s, m, g) in enumerate(zip(state.scores, state.momenta, gradients, strict=True)):
            lr, momentum, weight_decay, _, inv_scale = state.hyper[i].unbind()
            m.copy_(momentum * m + (g * inv_scale + weight_decay * s))
            s.sub_(lr * m)
            order = s.view(-1).sort(descending=True, stable=True).indices
            ranked = masks[i].view(-1)[order]
            inside = torch.arange(ranked.numel(), device=ranked.device) < kept[i]
            entering, leaving = inside & ~ranked, ~inside & ranked
            granted = torch.ceil(entering.sum() * rate)
            come = entering & (entering.cumsum(0) <= granted)
            go = leaving & (leaving.flip(0).cumsum(0).flip(0) <= granted)
            masks[i].view(-1)[order] = (ranked | come) & ~go
            state.effective[i].copy_(torch.where(masks[i], state.weights[i], 0))

    return step


def check_sync_free_step(start: State, gradients: list[Tensor]) -> None:
    """Check that it swaps what the reference does, but for scores that round otherwise."""
    expected, state = start.copy(), start.copy()
    exact_step(expected, gradients)
    sync_free_step(state, gradients)()
    require_same_swaps(state, expected, start)


def copy_bandwidth() -> float:
    """Return the bytes a second that a copy of 2 GiB reads and writes."""
    source = torch.empty(2**29, device="cuda")
    target = torch.empty_like(source)
    seconds = statistics.median(timed(lambda: target.copy_(source)) for _ in range(20))
    return 2 * source.numel() * 4 / seconds


def timed(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def launches(call: Call) -> int:
    """Return how many kernels run in a call."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_time_total > 0)


def measure(name: str, rounds: int, bandwidth: float) -> dict[str, float]:
    """Return medians in seconds, ratios and counts for one network."""
    shapes = (NETWORKS | TINY)[name]
    search = Search(shapes)
    gradients = [gradient.cuda() for gradient in search.gradients]
    start = to_device(search.state())

    def refill() -> None:
        search.draw_gradients()
        for to, gradient in zip(gradients, search.gradients, strict=True):
            to.copy_(gradient)

    ours, expected = Ours(start.copy(), gradients), start.copy()
    for _ in range(3):
        refill()
        ours.step()
        exact_step(expected, gradients)
        require_same_state(ours.state, expected)
    check_sync_free_step(start, gradients)
    kernels = launches(ours.step)
    update_only = Ours(start.copy(), gradients)
    scores, kept = start.copy().scores, start.num_kept[:, 0].tolist()
    contenders = {
        "update": graphed(update_only.update),
        "step": graphed(ours.step),
        "eager": eager_step(start.copy(), gradients),
        "compile": compiled_step(start.copy(), gradients),
        "compile, no sync, graphed": graphed(
            torch.compile(sync_free_step(start.copy(), gradients), dynamic=False)
        ),
        "authors": authors_step(start.copy(), gradients),
        "torch.topk": graphed(lambda: [s.view(-1).topk(k) for s, k in zip(scores, kept, strict=True)]),
        "torch.sort": graphed(lambda: [s.view(-1).sort(descending=True) for s in scores]),
    }
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    seconds: dict[str, list[float]] = {key: [] for key in contenders}
    cold: list[float] = []
    for _ in range(rounds):
        refill()
        for key, call in contenders.items():
            flush.zero_()
            torch.cuda.synchronize()
            seconds[key].append(timed(call))
        cold.append(ours.stats[:, 4].double().mean().item())
    median = {key: statistics.median(times) for key, times in seconds.items()}
    floor = sum(s.numel() for s in scores) * BYTES_PER_WEIGHT / bandwidth
    ratios = {
        f"{key} / step": median[key] / median["step"] for key in contenders if key not in ("update", "step")
    }
    return {
        "floor s": floor,
        **{f"{key} s": value for key, value in median.items()},
        "update / floor": median["update"] / floor,
        "step / floor": median["step"] / floor,
        **ratios,
        "launches in a step": kernels,
        "share of cold layers": statistics.mean(cold),
    }


def report(results: dict[str, dict[str, float]]) -> str:
    names = list(results)
    width = max(len(row) for row in results[names[0]])
    lines = [" " * width + "".join(f"{name:>16}" for name in names)]
    for row in results[names[0]]:
        lines.append(row.ljust(width) + "".join(f"{results[name][row]:16.4g}" for name in names))
    return "\n".join(lines)


def store(name: str, results: dict[str, dict[str, float]], *, keep: bool, **measured: float) -> None:
    """Print a table, and keep it with what made it as a file under ``RESULTS``, if it is to be kept.

    Args:
        measured: facts of the run besides the results.
    """
    device = torch.cuda.get_device_name()
    told = [device, *(f"{fact} {value:.4g}" for fact, value in measured.items())]
    print(f"{', '.join(told)}\n{report(results)}")
    if not keep:
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    folder = RESULTS / device.lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "command": " ".join([f"python -m benchmarks.bench_{name}", *sys.argv[1:]]),
        "commit": commit,
        "environment": facts(),
        **measured,
        "results": results,
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny network: a rehearsal that stores nothing"
    )
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_cuda_search_step needs a CUDA device")
    bandwidth = copy_bandwidth()
    names = TINY if arguments.quick else NETWORKS
    results = {name: measure(name, arguments.rounds, bandwidth) for name in names}
    store(
        "cuda_search_step",
        results,
        keep=not arguments.quick,
        **{"copy bandwidth B/s": bandwidth},
    )


if __name__ == "__main__":
    main()
