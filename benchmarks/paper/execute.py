"""Make the runs that are missing, one after the other or several at once, within a budget of time."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.paper.results import Result, Results
from benchmarks.paper.runs import Workshop, build, load
from benchmarks.paper.scales import Run

Say = Callable[[str], None]

# Training and test images, by the word that the name of a data set begins with.
_SIZES = {"cifar": (50_000, 10_000), "imagenet": (1_281_167, 50_000), "digits": (1_297, 500)}
# What evaluating an image costs, where training with it costs 1; how often each kind of run evaluates besides
# after its epochs; and how many steps the batches of a criterion are worth.
_FORWARD = 0.4
_TESTS = {"train": 1, "finetune": 1, "search": 2, "mask": 3, "untrained": 1, "library": 1}
_DRAW = 45  # for all numbers of swaps, in double precision
_PASSES = {"snip": 1, "grasp": 4}


def missing(runs: Iterable[Run], results: Results, workshop: Workshop) -> list[Run]:
    """Return the runs to make, in order: those without a result, and those whose checkpoints they need."""
    todo: dict[Run, None] = {}
    for run in runs:
        if run not in results:
            gone = [r for r in run.lineage[1:] if not workshop.checkpoint(r).is_file()]
            todo |= dict.fromkeys([*reversed(gone), run])
    return sorted(todo, key=lambda run: run.kind != "train")


def unavailable(runs: Iterable[Run]) -> dict[Run, str]:
    """Return the runs that cannot be made here, with the reason: a data set or a library is missing."""
    reasons: dict[tuple[str, object], str] = {}
    found = {}
    for run in runs:
        for what in (("data", (run.data, run.images)), ("network", run.network)):
            if what not in reasons:
                reasons[what] = _reason(run, what[0])
            if reasons[what]:
                found[run] = reasons[what]
    return found


def _reason(run: Run, what: str) -> str:
    try:
        load(run.data, run.images) if what == "data" else build(run.network)
    except (ImportError, OSError, ValueError) as error:
        return str(error)
    return ""


class Pace:
    """How long runs take: at first by a few steps of each network, then by the runs that have ended."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._probed: dict[str, float] = {}  # seconds an image
        self._spent: dict[str, tuple[float, float]] = {}  # seconds and images

    def seconds(self, run: Run) -> float:
        """Return how long a run is likely to take."""
        seconds, images = self._spent.get(run.network, (0.0, 0.0))
        if not images:
            if run.network not in self._probed:
                self._probed[run.network] = _probe(run, self._device)
            seconds, images = self._probed[run.network], 1.0
        return num_images(run) * seconds / images

    def learn(self, run: Run, seconds: float) -> None:
        """Take note of a run that has ended; one without steps tells little about others."""
        if run.epochs:
            before, images = self._spent.get(run.network, (0.0, 0.0))
            self._spent[run.network] = (before + seconds, images + num_images(run))


def num_images(run: Run) -> float:
    """Count the images that a run trains with, and those that it merely looks at for what they cost."""
    options = dict(run.options)
    all_images, test = next(sizes for word, sizes in _SIZES.items() if run.data.startswith(word))
    train = run.images or all_images
    every = options.get("evaluate_every", 1)
    tests = -(-run.epochs // every) + _TESTS.get(run.kind, 0)
    calibrated = min(100 * options.get("batch_size", 256), train) if "normalization" in options else 0
    draws = options.get("batches", 0) * options.get("draws", 0) * options.get("batch_size", 0)
    passes = _PASSES.get(options.get("criterion", ""), 0)
    looked_at = _FORWARD * tests * (test + calibrated) + _DRAW * draws
    return run.epochs * train + looked_at + passes * calibrated


def _probe(run: Run, device: torch.device) -> float:
    """Return the seconds that training takes an image, by two steps after a first."""
    options = dict(run.options)
    model = build(run.network).to(device)
    if options.get("channels_last"):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = options.get("batch_size", 256)
    image, _ = load(run.data, run.images)[1][0]
    inputs = torch.randn(size, *image.shape, device=device)
    labels = torch.zeros(size, dtype=torch.int64, device=device)
    for step in range(3):
        if step == 1:
            begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(options.get("amp"))):
            loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        loss.item()
    return (time.perf_counter() - begun) / (2 * size)


def threads_each(jobs: int) -> int:
    """Return the share of threads of each of several processes; one alone has what torch gives it."""
    return torch.get_num_threads() if jobs == 1 else max(1, len(os.sched_getaffinity(0)) // jobs)


def execute(
    todo: list[Run],
    results: Results,
    device: str,
    *,
    jobs: int,
    minutes: float | None,
    say: Say,
) -> list[Run]:
    """Make runs and keep their results as they end; return those for which there was no time.

    Args:
        todo: as ``missing`` returns it.
        results: of the folder that holds the checkpoints too.
        jobs: runs at once, each in a process of its own with its share of threads.
        minutes: nothing is started that would probably end later.
        say: told about every run, and first how long all will take.

    Raises:
        ValueError: when a run that was made again, for its checkpoint was gone, comes out otherwise: what
            starts from it would not be of the same network as what the folder holds already.
    """
    if not todo:
        return []
    begun, folder = time.monotonic(), results.folder
    pace, threads = Pace(device), torch.get_num_threads()
    torch.set_num_threads(threads_each(jobs))
    try:
        total = sum(map(pace.seconds, todo)) / jobs
        images = sum(map(num_images, todo))
        say(f"{len(todo)} runs, {images:,.0f} images, about {total / 60:.0f} minutes with {jobs} at once")

        def fits(run: Run) -> bool:
            return minutes is None or time.monotonic() - begun + pace.seconds(run) <= 60 * minutes

        left = dict.fromkeys(todo)
        made = (
            _in_turn(todo, fits, folder, device) if jobs == 1 else _at_once(todo, fits, folder, device, jobs)
        )
        with closing(made):
            for run, result in made:
                del left[run]
                pace.learn(run, result["seconds"])
                if run not in results:
                    results.add(result)
                else:
                    _require_same(run, result, results, Workshop(folder, device))
                ahead = sum(map(pace.seconds, left)) / jobs / 60
                told = f"{_told(result)}, {result['seconds']:.0f} s"
                say(f"{run}: {told}; {len(left)} left, about {ahead:.0f} minutes")
    finally:
        torch.set_num_threads(threads)
    return list(left)


def _require_same(run: Run, result: Result, results: Results, workshop: Workshop) -> None:
    known = results.get(run)
    if known and result.get("accuracy") != known.get("accuracy"):
        workshop.checkpoint(run).unlink()
        raise ValueError(
            f"{run} must come out as in {results.path}, {_told(known)}, got {_told(result)} (another "
            "processor or number of threads rounds otherwise): give what starts from it another --output"
        )


def _told(result: Result) -> str:
    return f"{result['accuracy']:.2%}" if "accuracy" in result else "done"


Made = Generator[tuple[Run, Result], None, None]
Fits = Callable[[Run], bool]


def _in_turn(todo: list[Run], fits: Fits, folder: Path, device: str) -> Made:
    """Make runs in this process."""
    workshop = Workshop(folder, device)
    for run in todo:
        if not fits(run):
            return
        yield run, workshop.make(run)


def _at_once(todo: list[Run], fits: Fits, folder: Path, device: str, jobs: int) -> Made:
    """Make runs in several processes; one that starts from another waits for it."""
    context = multiprocessing.get_context("spawn")
    waiting = dict.fromkeys(todo)
    idle: list[Connection] = []
    running: dict[Connection, Run] = {}
    processes = []
    try:
        for _ in range(min(jobs, len(todo))):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, folder, device, torch.get_num_threads()))
            process.start()
            there.close()
            processes.append(process)
            idle.append(here)
        while True:
            while idle:
                busy = set(running.values()) | waiting.keys()
                ready = next((run for run in waiting if not busy & set(run.lineage[1:])), None)
                if ready is None:
                    break
                if not fits(ready):
                    waiting.clear()
                    break
                del waiting[ready]
                running[idle[-1]] = ready
                idle.pop().send(ready)
            if not running:
                return
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                run = running.pop(connection)
                yield run, _received(connection, run)
                idle.append(connection)
    finally:
        for process in processes:
            process.terminate()


def _serve(connection: Connection, folder: Path, device: str, threads: int) -> None:
    """Make runs as they are asked for; Ctrl-C is left to the process that asks, and no run outlives that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    workshop = Workshop(folder, device)
    # Where the process that asks is gone, there is nobody to tell.
    with suppress(EOFError, ConnectionError):
        while True:
            run = connection.recv()
            try:
                answer: Result | Exception = workshop.make(run)
            except Exception as error:
                answer = error
            connection.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _received(connection: Connection, run: Run) -> Result:
    try:
        answer = connection.recv()
    except EOFError:
        raise ChildProcessError(f"the process of {run} ended without a result") from None
    if isinstance(answer, Exception):
        raise answer
    return answer
