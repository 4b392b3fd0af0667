"""The search step on a GPU: ``python -m benchmarks.bench_cuda_search_step`` prints a table and stores it.

Contenders take turns, round by round, each with a cold L2 cache that holds nothing to write back. CUDA events
stand around the replay of a graph, or the call of a contender that waits for the host. Medians are of warm
steps in the middle of a search; means show the rare steps that scan a layer again. A floor is the bytes of an
update at the copy bandwidth measured in the same run.
"""

import argparse
import ctypes
import json
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.baselines import authors_step, compiled_step, eager_step, exact_step
from benchmarks.checks import require_same_state, require_same_swaps
from benchmarks.harness import facts
from benchmarks.paper.runs import commit
from benchmarks.searches import TOTAL_STEPS, WARM_STEPS, Search, State
from benchmarks.shapes import NETWORKS, TINY
from jackpot_kernels.ops.score_update import score_update_
from jackpot_kernels.ops.swap import new_workspace, swap_

# Gradient, score, momentum and a bit of the mask read, score and momentum written; and, as the targets count,
# the weight, which our update does not read. The look for NaN, which may find gradients in L2, is in neither.
BYTES_PER_WEIGHT = {"floor of 20.125 B": 20.125, "floor of 24.125 B": 24.125}
# Rounds before those that count, in which the windows around the thresholds find their width.
WARM_ROUNDS = 10
MOST_ROUNDS = TOTAL_STEPS - WARM_STEPS - WARM_ROUNDS - 10
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

    def swap(self) -> None:
        s = self.state
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

    def step(self) -> None:
        self.update()
        self.swap()


def graphed(call: Call, warm_up: Call | None = None) -> Call:
    """Return the replay of a graph of ``call``; it, or ``warm_up`` in its place, runs a few times first."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            (warm_up or call)()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay() -> Call:
        graph.replay()
        # With it lives all that it reads and writes, such as the state of an optimizer.
        return call

    return replay


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
    """Return how many nodes a graph of a call has: kernels, and copies and fills."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        call()
    count = ctypes.c_size_t()
    # A profiler would do, too, but is not to be had on every machine.
    error = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(
        ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count)
    )
    if error:
        raise RuntimeError(f"cuGraphGetNodes must return 0, got {error}")
    return count.value


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


def take_turns(
    contenders: Mapping[str, Call], rounds: int, *, prepare: Call, afterwards: Mapping[str, Call]
) -> dict[str, list[float]]:
    """Return the seconds that each contender took, round by round.

    Args:
        prepare: called before each round.
        afterwards: called after the contender of that name, untimed.
    """
    # What is only read drives out what was written before, and need not be written back itself. It takes the
    # device longer than the host takes to launch the call.
    ballast = torch.zeros(2**28, device="cuda")
    seconds: dict[str, list[float]] = {key: [] for key in contenders}
    for _ in range(WARM_ROUNDS + rounds):
        prepare()
        for key, call in contenders.items():
            ballast.sum()
            seconds[key].append(timed(call))
            if key in afterwards:
                afterwards[key]()
    return {key: times[WARM_ROUNDS:] for key, times in seconds.items()}


def averages(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median and the mean of each contender."""
    return {
        f"{key} {mean}s": average(times)
        for key, times in seconds.items()
        for mean, average in (("", statistics.median), ("mean ", statistics.mean))
    }


class Contest:
    """The contenders on one network, each with a state of its own that starts in the middle of a search."""

    def __init__(self, name: str) -> None:
        self._search = Search((NETWORKS | TINY)[name])
        self.gradients = [gradient.cuda() for gradient in self._search.gradients]
        self.start = to_device(self._search.state())
        ours, expected = self.ours(), self.start.copy()
        for _ in range(3):
            self.refill()
            ours.step()
            exact_step(expected, self.gradients)
            require_same_state(ours.state, expected)

    def ours(self) -> Ours:
        return Ours(self.start.copy(), self.gradients)

    def refill(self) -> None:
        """Write the gradients of the next step."""
        self._search.draw_gradients()
        for to, gradient in zip(self.gradients, self._search.gradients, strict=True):
            to.copy_(gradient)

    def time(
        self, makers: Mapping[str, Callable[[], Call]], rounds: int, afterwards: Mapping[str, Call]
    ) -> dict[str, list[float]]:
        """Return the seconds of those contenders that can be made."""
        contenders = {key: call for key, make in makers.items() if (call := ready(key, make))}
        return take_turns(contenders, rounds, prepare=self.refill, afterwards=afterwards)


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Return each contender's median over that of our step."""
    step = statistics.median(seconds["step"])
    others = (key for key in seconds if key not in ("update", "step"))
    return {f"{key} / step": statistics.median(seconds[key]) / step for key in others}


def measure(contest: Contest, rounds: int, bandwidth: float) -> dict[str, float]:
    """Return our times in seconds, against the floors and all that need not be compiled."""
    ours, halves = contest.ours(), contest.ours()
    start, gradients = contest.start, contest.gradients
    scores, kept = start.copy().scores, start.num_kept[:, 0].tolist()
    scanned: list[Tensor] = []
    seconds = contest.time(
        {
            # Between two updates comes a swap, so that each emits candidates as in a search.
            "update": lambda: graphed(halves.update, warm_up=halves.step),
            "step": lambda: graphed(ours.step),
            "eager": lambda: eager_step(start.copy(), gradients),
            "authors": lambda: authors_step(start.copy(), gradients),
            "torch.topk": lambda: graphed(
                lambda: [s.view(-1).topk(k) for s, k in zip(scores, kept, strict=True)]
            ),
            "torch.sort": lambda: graphed(lambda: [s.view(-1).sort(descending=True) for s in scores]),
        },
        rounds,
        {"update": halves.swap, "step": lambda: scanned.append(ours.stats[:, 4].sum())},
    )
    floors = {
        key: sum(s.numel() for s in scores) * each / bandwidth for key, each in BYTES_PER_WEIGHT.items()
    }
    return {
        **{f"{key} s": floor for key, floor in floors.items()},
        **averages(seconds),
        **{
            f"{key} / {name}": statistics.median(seconds[key]) / floor
            for key in ("update", "step")
            for name, floor in floors.items()
        },
        **ratios(seconds),
        "layers": len(scores),
        "layers scanned again in a step": torch.stack(scanned[WARM_ROUNDS:]).double().mean().item(),
    }


def measure_compiled(contest: Contest, rounds: int, what: str) -> dict[str, float]:
    """Return the times of what torch.compile makes, and its ratio to our step in the same rounds.

    Args:
        what: "compile", the reference's step, or "compile, no sync, graphed".
    """
    torch.compiler.reset()
    ours, start, gradients = contest.ours(), contest.start, contest.gradients

    def graphed_without_sync() -> Call:
        check_sync_free_step(start, gradients)
        return graphed(torch.compile(sync_free_step(start.copy(), gradients), dynamic=False))

    makers = {
        "step": lambda: graphed(ours.step),
        "compile": lambda: compiled_step(start.copy(), gradients),
        "compile, no sync, graphed": graphed_without_sync,
    }
    seconds = contest.time({key: makers[key] for key in ("step", what)}, rounds, {})
    return {**averages({key: seconds[key] for key in seconds if key != "step"}), **ratios(seconds)}


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
    measures: Mapping[str, Callable[[str], dict[str, float]]],
    options: argparse.Namespace,
    **measured: float,
) -> int:
    """Measure networks, print the table, and return the exit code.

    Every network has had the first of ``measures`` before any has the next. What is done is stored at once;
    what fails is named, and the others go on, but for those of a network whose first one failed.
    """
    results: dict[str, dict[str, float]] = {}
    failed = False
    for number, (what, measure) in enumerate(measures.items()):
        for network in list(results) if number else networks:
            print(f"{network}, {what} ...", file=sys.stderr, flush=True)
            try:
                results[network] = results.get(network, {}) | measure(network)
            except Exception:
                traceback.print_exc()
                print(f"{network}, {what} is left out", file=sys.stderr, flush=True)
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
    if not 1 <= options.rounds <= MOST_ROUNDS:
        parser.error(f"--rounds must be in [1, {MOST_ROUNDS}], got {options.rounds}")
    if not torch.cuda.is_available():
        sys.exit("bench_cuda_search_step needs a CUDA device")
    bandwidth = copy_bandwidth()
    contest = cache(Contest)
    measures: dict[str, Callable[[str], dict[str, float]]] = {
        "kernels": lambda name: measure(contest(name), options.rounds, bandwidth),
        "launches": lambda name: {"launches in a step": launches(contest(name).ours().step)},
    }
    # The one that a target names comes first.
    for what in () if options.no_compile else ("compile, no sync, graphed", "compile"):
        measures[what] = lambda name, what=what: measure_compiled(contest(name), options.rounds, what)
    names = TINY if options.quick else options.networks
    return measure_all("cuda_search_step", names, measures, options, **{"copy bandwidth B/s": bandwidth})


if __name__ == "__main__":
    sys.exit(main())
