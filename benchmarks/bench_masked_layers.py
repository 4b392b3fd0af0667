"""Masked layers on a GPU, shape by shape: ``python -m benchmarks.bench_masked_layers``.

Contenders take turns round by round, each after the L2 cache was written over; CUDA events stand around the
replay of a graph, so that no host is measured. All see bfloat16, and convolutions see channels_last:

    eager      F.linear(x, w * m), likewise F.conv2d, by autograd
    compile    the same, compiled
    library    the dense call on a weight that is masked already; the score gradient lacks its factor
    dense      our layer with backend="dense"
    fused      our layer with backend="fused"
    mixed      our layer with backend="mixed"
    auto       whichever of these three "auto" chooses: the same kernels, hence the same time

What a run has finished is kept: the next one with the same commit and versions goes on from there.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jackpot_kernels as jk
from benchmarks.harness import facts
from benchmarks.masked_layers_report import rules, write_report
from benchmarks.paper.runs import commit
from benchmarks.report import RESULTS
from benchmarks.shapes import FAMILIES, TINY_FAMILIES, Layer
from jackpot_kernels.models import VGG19

EXECUTORS = ("eager", "compile", "library", "dense", "mixed", "fused")
# How many products of the size of a forward pass a mode consists of.
MODES = {"forward": 1, "backward": 2, "both": 3}
KEPT = 0.1
ROUNDS = 11
# Seconds of rounds after which the contest of one shape and mode ends, if it had three.
CONTEST_S = 1.0
DTYPE = torch.bfloat16

Call = Callable[[], object]


class Problem:
    """One layer with its input, its mask and the gradient of its output."""

    def __init__(self, shape: Layer, device: str) -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> Tensor:
            tensor = torch.randn(size, generator=generator, device=device, dtype=DTYPE)
            return tensor.to(memory_format=torch.channels_last) if len(size) == 4 else tensor

        if shape.is_linear:
            self.x = draw(shape.batch, shape.weight[1])
        else:
            self.x = draw(shape.batch, shape.in_channels, shape.size, shape.size)
        self.x.requires_grad_()
        self.weight = draw(*shape.weight) / math.sqrt(math.prod(shape.weight[1:]))
        kept = torch.rand(shape.weight, generator=generator, device=device) < KEPT
        self.kept = kept.contiguous(memory_format=torch.channels_last) if kept.dim() == 4 else kept
        # As a user would hold it who multiplies: in the compute dtype, with a straight-through gradient.
        self.mask = self.kept.to(DTYPE).requires_grad_()
        self.effective = (self.weight * self.kept).requires_grad_()
        self.grad = torch.empty_like(self.apply(self.x, self.weight)).normal_(generator=generator)

    @property
    def window(self) -> dict[str, int]:
        shape = self.shape
        return {"stride": shape.stride, "padding": shape.weight[-1] // 2, "groups": shape.groups}

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The dense layer with this weight."""
        return F.linear(x, weight) if self.shape.is_linear else F.conv2d(x, weight, **self.window)

    def layer(self, backend: str) -> nn.Module:
        """Our layer, frozen, with this weight and mask."""
        size, window = self.shape.weight, {} if self.shape.is_linear else self.window
        kind: Any = nn.Linear if self.shape.is_linear else nn.Conv2d
        sizes = (size[1], size[0]) if self.shape.is_linear else (self.shape.in_channels, size[0], size[2])
        plain = kind(*sizes, **window, bias=False, device="meta")
        plain.weight = nn.Parameter(self.weight)
        layer = (jk.MaskedLinear if self.shape.is_linear else jk.MaskedConv2d).from_dense(plain)
        layer.mask, layer.backend = self.kept, backend
        return layer


class Contender(NamedTuple):
    """A layer as a function of its input, and what its backward pass differentiates besides."""

    forward: Callable[[Tensor], Tensor]
    parameter: Tensor


def make_contender(problem: Problem, executor: str) -> Contender:
    if executor == "library":
        return Contender(lambda x: problem.apply(x, problem.effective), problem.effective)
    if executor in ("eager", "compile"):

        def masked(x: Tensor) -> Tensor:
            return problem.apply(x, problem.weight * problem.mask)

        call = masked if executor == "eager" else torch.compile(masked, dynamic=False, fullgraph=True)
        return Contender(call, problem.mask)
    layer = problem.layer(executor)
    return Contender(layer, layer.scores)  # type: ignore[arg-type]


def calls(problem: Problem, contender: Contender) -> dict[str, Call]:
    """Return what is timed in each mode; the backward pass starts from a forward pass that is not."""
    wanted = problem.x, contender.parameter

    def forward() -> Tensor:
        with torch.no_grad():
            return contender.forward(problem.x)

    y = contender.forward(problem.x)

    def backward() -> object:
        return torch.autograd.grad(y, wanted, problem.grad, retain_graph=True)

    def both() -> object:
        return torch.autograd.grad(contender.forward(problem.x), wanted, problem.grad)

    return {"forward": forward, "backward": backward, "both": both}


def require_right(problem: Problem, executor: str, contender: Contender) -> None:
    """Check output and gradients against full precision: at most twice the error of eager, and a rounding."""
    x, mask = problem.x.detach().float().requires_grad_(), problem.kept.float().requires_grad_()
    weight = problem.weight.float()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y = problem.apply(x, weight * mask)
        truth = y.detach(), *torch.autograd.grad(y, (x, mask), problem.grad.float())
    results = []
    for each in (contender, make_contender(problem, "eager")):
        y = each.forward(problem.x)
        results.append((y.detach(), *torch.autograd.grad(y, (problem.x, each.parameter), problem.grad)))
    for name, our, their, true in zip(("output", "dx", "score gradient"), *results, truth, strict=True):
        if name == "score gradient" and executor == "library":
            our = our * problem.weight
        error, allowed = ((t.float() - true).abs().max().item() for t in (our, their))
        allowed = 2 * allowed + 2 * torch.finfo(DTYPE).eps * true.abs().max().item()
        if not error <= allowed:
            raise AssertionError(
                f"{executor} on {problem.shape}: {name} is off by {error}, allowed is {allowed}"
            )


class Clock:
    """How a call is prepared and timed on a device; on the CPU nothing is measured that means anything."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        # Autograd runs a backward pass on the stream of its forward pass, so both belong to the captured one.
        self.stream = torch.cuda.Stream() if self.cuda else None
        self.ballast = torch.empty(2**28 if self.cuda else 1, dtype=torch.uint8, device=device)

    def ready(self, call: Call) -> Call:
        """Return the call as a graph's replay, after some calls that build and tune what it needs."""
        for _ in range(3):
            call()
        if not self.cuda:
            return call
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            call()
        return graph.replay

    def seconds(self, call: Call) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        # The device is still busy with the flush when the host has launched the call.
        torch.cuda.synchronize()
        self.ballast.zero_()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        call()
        marks[1].record()
        marks[1].synchronize()
        return marks[0].elapsed_time(marks[1]) / 1e3

    def peak_bytes(self, call: Call) -> int:
        """Return what a call allocates at most, beyond what was there before it."""
        if not self.cuda:
            return 0
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def contest(self, contenders: dict[str, Call]) -> dict[str, list[float]]:
        """Return the seconds of each contender, which take turns."""
        ready = {name: self.ready(call) for name, call in contenders.items()}
        times: dict[str, list[float]] = {name: [] for name in ready}
        start = time.perf_counter()
        for i in range(ROUNDS):
            if i >= 3 and time.perf_counter() - start > CONTEST_S:
                break
            for name, call in ready.items():
                times[name].append(self.seconds(call))
        return times


def least_bytes(shape: Layer, mode: str) -> int:
    """Return what must be read and written: 2 bytes an element, a bit of mask, 4 bytes a score gradient."""
    weights, x = math.prod(shape.weight), shape.tokens * shape.in_channels
    y = shape.out_tokens * shape.weight[0]
    forward = 2 * (x + y + weights) + weights // 8
    backward = 2 * (2 * x + y + weights) + weights // 8 + 4 * weights
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def measure(
    family: str, shape: Layer, executors: Sequence[str], clock: Clock, device: str
) -> list[dict[str, Any]]:
    """Return a row for each executor and mode of a layer."""
    torch._dynamo.reset()
    problem = Problem(shape, device)
    contenders = {name: make_contender(problem, name) for name in executors}
    for name, each in contenders.items():
        require_right(problem, name, each)
    timed = {name: calls(problem, each) for name, each in contenders.items()}
    rows = []
    for mode, products in MODES.items():
        peaks = {name: clock.peak_bytes(modes[mode]) for name, modes in timed.items()}
        times = clock.contest({name: modes[mode] for name, modes in timed.items()})
        for name, seconds in times.items():
            median = statistics.median(seconds)
            rows.append(
                {
                    "family": family,
                    "shape": list(shape),
                    "layer": str(shape),
                    "mode": mode,
                    "executor": name,
                    "seconds": seconds,
                    "median_s": median,
                    "bytes": least_bytes(shape, mode),
                    "tflops": products * shape.flops / median / 1e12,
                    "peak_bytes": peaks[name],
                }
            )
    return rows


def measure_score_gradient(family: str, shape: Layer, clock: Clock, device: str) -> list[dict[str, Any]]:
    """Return rows of the score gradient alone: by the library, multiplied and added after it, and fused."""
    problem = Problem(shape, device)
    x, weight, grad = problem.x.detach(), problem.weight, problem.grad
    sums = torch.zeros(shape.weight, dtype=torch.float32, device=device)
    library = sums.clone()

    def by_library() -> None:
        library.add_((grad.t() @ x) * weight)

    def fused() -> None:
        jk.masked_linear_score_grad_(sums, grad, x, weight, backend="fused")

    by_library()
    fused()
    if not torch.allclose(sums, library, rtol=0.02, atol=0.02 * library.abs().max().item()):
        raise AssertionError(
            f"score gradients on {shape} must be close, differ by {(sums - library).abs().max()}"
        )
    times = clock.contest({"library": by_library, "fused": fused})
    return [
        {
            "family": family,
            "shape": list(shape),
            "layer": str(shape),
            "mode": "score gradient",
            "executor": name,
            "seconds": seconds,
            "median_s": statistics.median(seconds),
        }
        for name, seconds in times.items()
    ]


def training_memory(clock: Clock, device: str, batch: int, width: float) -> dict[str, int]:
    """Return the peak bytes of a training step of VGG-19 by backend, and those of eager for its masks.

    Eager is backend="reference": each forward pass unpacks the masks and multiplies, and autograd keeps both.
    """
    peaks = {}
    x = torch.randn(batch, 3, 32, 32, device=device, dtype=DTYPE).to(memory_format=torch.channels_last)
    for backend in ("reference", "fused"):
        torch.manual_seed(0)
        model = jk.convert(VGG19(width=width))
        jk.initialize(model, 1 - KEPT)
        model = model.to(device=device, dtype=DTYPE, memory_format=torch.channels_last)
        layers = list(jk.masked_layers(model).values())
        for layer in layers:
            layer.backend = backend
        scores = [layer.scores for layer in layers if layer.scores.requires_grad]

        def step() -> object:
            return torch.autograd.grad(model(x).float().square().mean(), scores)  # noqa: B023

        peaks[backend] = clock.peak_bytes(step)
    weights = sum(layer.weight.numel() for layer in layers)
    return peaks | {"effective weights and masks": weights * (DTYPE.itemsize + torch.bool.itemsize)}


def urgency(family: str, shape: Layer) -> int:
    """Return what is measured first where time is short: the shapes that the targets name."""
    if shape.weight == (4096, 4096) or (family == "ResNet-50" and shape.weight[2:] == (1, 1)):
        return 0
    return 1 if family == "ResNet-50" else 2 if shape.is_linear and shape.batch <= 64 else 3


def todo(families: dict[str, list[Layer]]) -> list[tuple[str, Layer]]:
    """Return all shapes, the most urgent first, and among equals the families in turn."""
    places = [
        (urgency(f, shape), i, f, shape) for f, shapes in families.items() for i, shape in enumerate(shapes)
    ]
    return [(family, shape) for _, _, family, shape in sorted(places, key=lambda place: place[:2])]


def compile_all(families: dict[str, list[Layer]], device: str, processes: int) -> None:
    """Compile what Triton is going to run, in several processes."""
    context = multiprocessing.get_context("spawn")
    shapes = todo(families)
    shares = [(shapes[i::processes], device) for i in range(processes)]
    workers = [context.Process(target=compile_some, args=share) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def compile_some(shapes: Sequence[tuple[str, Layer]], device: str) -> None:
    """Run our layers once; what a device that others use chooses is thrown away.

    Whatever fails here fails again, and is named, when it is measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JACKPOT_CACHE"] = folder
        for _, shape in shapes:
            with suppress(Exception):
                problem = Problem(shape, device)
                for executor in ("mixed", "fused"):
                    calls(problem, make_contender(problem, executor))["both"]()


def load(path: Path, stamp: dict[str, Any]) -> dict[str, Any]:
    """Return the record to go on with: the stored one if it has the same stamp, else an empty one."""
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text())
        if all(record.get(key) == value for key, value in stamp.items()):
            return record
    return stamp | {"commands": [], "rows": [], "training memory": None}


def save(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.new")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(beside, path)


def run(record: dict[str, Any], path: Path, options: argparse.Namespace, device: str) -> list[str]:
    """Measure what the record lacks until the time is over, and store it after every shape.

    Returns:
        What failed; all else is measured all the same.
    """
    failed: list[str] = []
    clock = Clock(device)
    end = time.monotonic() + 60 * options.minutes
    families = TINY_FAMILIES if options.smoke else FAMILIES
    if record["training memory"] is None:
        try:
            record["training memory"] = training_memory(
                clock, device, *((2, 1 / 16) if options.smoke else (256, 1))
            )
            save(record, path)
        except Exception:
            traceback.print_exc()
            failed.append("training memory")
    # The library's convolutions are at their best when it may try its algorithms.
    torch.backends.cudnn.benchmark = True
    done: dict[tuple[str, str], set[str]] = {}
    for row in record["rows"]:
        done.setdefault((row["family"], row["layer"]), set()).add(row["executor"])
    for family, shape in todo(families):
        before = done.get((family, str(shape)), set())
        if before.issuperset(options.executors):
            continue
        # Contenders take turns, so those that were measured before are measured again.
        executors = [name for name in EXECUTORS if name in before.union(options.executors)]
        if time.monotonic() > end:
            print(f"{options.minutes:g} minutes are over; run it again to go on")
            break
        print(f"{family}: {shape}", flush=True)
        try:
            with torch.cuda.stream(clock.stream):
                rows = measure(family, shape, executors, clock, device)
                if shape.is_linear and shape.weight[0] == shape.weight[1] and "fused" in executors:
                    rows += measure_score_gradient(family, shape, clock, device)
        except Exception:
            traceback.print_exc()
            failed.append(f"{family}: {shape}")
            continue
        measured = {(row["family"], row["layer"]) for row in rows}
        record["rows"] = [
            row for row in record["rows"] if (row["family"], row["layer"]) not in measured
        ] + rows
        save(record, path)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_masked_layers", description=__doc__)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no shape after so long")
    parser.add_argument(
        "--executors", nargs="+", choices=EXECUTORS, default=EXECUTORS, help="compiling takes the longest"
    )
    parser.add_argument(
        "--compile-jobs", type=int, default=0, help="processes that compile Triton's kernels beforehand"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, here and now: measures nothing")
    parser.add_argument(
        "--rules", action="store_true", help="print the rules that the stored results support"
    )
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not (options.smoke or options.rules):
        sys.exit("bench_masked_layers needs a CUDA device, or --smoke")
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    paths = sorted(options.output.glob("*/masked_layers.json"))
    path = options.output / name.lower().replace(" ", "-") / "masked_layers.json"
    if options.rules:
        for each in paths:
            print(rules(json.loads(each.read_text())))
        return 0
    stamp = {"device": name, "commit": options.commit or commit(), "versions": facts()["versions"]}
    record = load(path, stamp)
    record["commands"].append(
        " ".join(["python -m benchmarks.bench_masked_layers", *(arguments or sys.argv[1:])])
    )
    if options.compile_jobs > 0:
        compile_all(TINY_FAMILIES if options.smoke else FAMILIES, device, options.compile_jobs)
    failed = run(record, path, options, device)
    print(write_report(record, path.parent))
    for what in failed:
        print(f"failed, and not measured: {what}")
    if options.smoke:
        print("a rehearsal on tiny shapes: it measures nothing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
