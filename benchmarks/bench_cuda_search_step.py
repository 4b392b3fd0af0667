"""The search step on a GPU: ``python -m benchmarks.bench_cuda_search_step`` prints a table and stores it.

Times are medians of rounds in which all contenders take turns, each after the L2 cache was written over. CUDA
events stand around the replay of a graph, or the call of a contender that waits for the host. The floor
is the bytes that an update must move at the copy bandwidth measured in the same run.
"""

import argparse
import json
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.baselines import authors_step, compiled_step, eager_step, exact_step
from benchmarks.checks import require_same_state, require_same_swaps
from benchmarks.harness import facts
from benchmarks.paper.runs import commit
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
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    seconds = statistics.median(timed(lambda: target.copy_(source)) for _ in range(20))
    return 2 * source.numel() * 4 / seconds


def timed(call: Call) -> float:
    """Return the seconds that a call takes on the device, once this has done what it was given before."""
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


def ready(key: str, make: Callable[[], Call]) -> Call | None:
    """Return a contender after its first call, which may compile it; None where it fails, and say why."""
    try:
        call = make()
        call()
        torch.cuda.synchronize()
    except Exception as error:
        if key in ("update", "step"):
            raise
        print(f"{key} is left out: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None
    return call


def measure(name: str, rounds: int, bandwidth: float, *, compiled: bool) -> dict[str, float]:
    """Return medians in seconds, ratios and counts for one network, ``compiled`` contenders among them."""
    torch.compiler.reset()
    search = Search((NETWORKS | TINY)[name])
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
    makers: dict[str, Callable[[], Call]] = {
        "update": lambda: graphed(update_only.update),
        "step": lambda: graphed(ours.step),
        "eager": lambda: eager_step(start.copy(), gradients),
        "compile": lambda: compiled_step(start.copy(), gradients),
        "compile, no sync, graphed": lambda: graphed(
            torch.compile(sync_free_step(start.copy(), gradients), dynamic=False)
        ),
        "authors": lambda: authors_step(start.copy(), gradients),
        "torch.topk": lambda: graphed(
            lambda: [s.view(-1).topk(k) for s, k in zip(scores, kept, strict=True)]
        ),
        "torch.sort": lambda: graphed(lambda: [s.view(-1).sort(descending=True) for s in scores]),
    }
    wanted = {key: make for key, make in makers.items() if compiled or not key.startswith("compile")}
    contenders = {key: call for key, make in wanted.items() if (call := ready(key, make))}
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    seconds: dict[str, list[float]] = {key: [] for key in contenders}
    cold: list[float] = []
    for _ in range(rounds):
        refill()
        for key, call in contenders.items():
            # The device is still busy with the flush when the host has launched the call.
            torch.cuda.synchronize()
            flush.zero_()
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


def report(results: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table with a column for each network; what was not measured there is left blank."""
    rows = list(dict.fromkeys(row for figures in results.values() for row in figures))
    width = max(map(len, rows), default=0)
    lines = [" " * width + "".join(f"{name:>16}" for name in results)]
    for row in rows:
        cells = (f"{figures[row]:16.4g}" if row in figures else " " * 16 for figures in results.values())
        lines.append(row.ljust(width) + "".join(cells))
    return "\n".join(lines)


def store(name: str, results: Mapping[str, Mapping[str, float]], output: Path, **measured: float) -> None:
    """Keep results with what made them, in a folder named after the device.

    Args:
        output: where that folder is.
        measured: facts of the run besides the results.
    """
    path = output / torch.cuda.get_device_name().lower().replace(" ", "-") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": " ".join([f"python -m benchmarks.bench_{name}", *sys.argv[1:]]),
        "commit": commit(),
        "environment": facts(),
        **measured,
        "results": results,
    }
    beside = path.with_suffix(".json.new")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(path)


def measure_all(
    name: str,
    networks: Iterable[str],
    measure: Callable[[str], dict[str, float]],
    options: argparse.Namespace,
    **measured: float,
) -> int:
    """Measure networks one after the other, print the table, and return the exit code.

    What is done is stored after each network; one that fails is named, and the others are measured.
    """
    results: dict[str, dict[str, float]] = {}
    failed = False
    for network in networks:
        print(f"{network} ...", file=sys.stderr, flush=True)
        try:
            results[network] = measure(network)
        except Exception:
            traceback.print_exc()
            print(f"{network} is left out", file=sys.stderr, flush=True)
            failed = True
            continue
        if not options.quick:
            store(name, results, options.output, **measured)
    told = [torch.cuda.get_device_name(), *(f"{fact} {value:.4g}" for fact, value in measured.items())]
    print(f"{', '.join(told)}\n{report(results)}")
    return int(failed)


def make_parser(
    name: str, description: str | None, networks: Iterable[str], rounds: int
) -> argparse.ArgumentParser:
    """Return a parser of the options that the benchmarks on a GPU share."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{name}", description=description)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny network: a rehearsal that stores nothing"
    )
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--networks", nargs="+", choices=list(networks), default=list(networks))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    return parser


def main() -> int:
    parser = make_parser("cuda_search_step", __doc__, NETWORKS, rounds=50)
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out what torch.compile makes, which takes minutes"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_cuda_search_step needs a CUDA device")
    bandwidth = copy_bandwidth()
    names = TINY if options.quick else options.networks
    return measure_all(
        "cuda_search_step",
        names,
        lambda name: measure(name, options.rounds, bandwidth, compiled=not options.no_compile),
        options,
        **{"copy bandwidth B/s": bandwidth},
    )


if __name__ == "__main__":
    sys.exit(main())
