"""Fair timing: contenders take turns round by round in one process, each from cold caches."""

import ctypes
import gc
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from jackpot_kernels.environment import environment

THREADS = 2
# Copies of one contender differ by up to 5 % by where their memory happens to lie: each is some, in turn.
TWINS = 3
MIN_ROUNDS, MAX_ROUNDS = 5, 100
# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

Call = Callable[[], object]


def contest(
    benchmark: BenchmarkFixture,
    ours: Call,
    others: Mapping[str, Call],
    *,
    budget_s: float,
    prepare: Call = lambda: None,
) -> None:
    """Time ``others`` and ``ours`` in turn; each time is taken after the caches were written over.

    Times of ``ours`` are those of pytest-benchmark; those of the others stand beside it, round for round, in
    ``extra_info["others"]``, in seconds; ``extra_info["disturbance"]`` says how busy other programs kept the
    processors meanwhile, and is None where the system does not tell.

    Args:
        budget_s: about how long to go on, for at least ``MIN_ROUNDS`` and at most ``MAX_ROUNDS`` rounds.
        prepare: called before each round, untimed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in others}

    def time_others() -> None:
        prepare()
        for name, call in others.items():
            flush_caches()
            start = perf_counter()
            call()
            seconds[name].append(perf_counter() - start)
        flush_caches()

    start = perf_counter()
    time_others()
    ours()
    rounds = int(budget_s / (perf_counter() - start))
    for times in seconds.values():
        times.clear()
    gc.collect()
    gc.disable()
    wall, busy = perf_counter(), _others_busy_s()
    try:
        benchmark.pedantic(
            ours, setup=time_others, rounds=min(max(rounds, MIN_ROUNDS), MAX_ROUNDS), iterations=1
        )
    finally:
        gc.enable()
    wall, busy_after = perf_counter() - wall, _others_busy_s()
    benchmark.extra_info["others"] = seconds
    benchmark.extra_info["disturbance"] = (
        None if busy is None or busy_after is None else max(0.0, busy_after - busy) / wall
    )


def in_turn(calls: Sequence[Call]) -> Call:
    """Return a call of the next of ``calls``, which come round again; each was called once before."""
    for call in calls:
        call()
    endless = cycle(calls)
    return lambda: next(endless)()


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, where it can be told to.

    Otherwise every training step gives its activations back to the system and takes the pages anew, which
    costs what it may and differs from contender to contender by chance.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def ratio(over: list[float], under: list[float]) -> float:
    """Return the ratio of two medians.

    Raises:
        ValueError: when a side has no times.
    """
    if not over or not under:
        raise ValueError(f"times must be there on both sides, got {len(over)} and {len(under)}")
    return statistics.median(over) / statistics.median(under)


def facts() -> dict[str, Any]:
    """Return the environment of a run, less the paths in it, which tell of one machine only."""
    found = environment()
    for part in ("extension", "tuning"):
        found[part].pop("path", None)
    return found


def _others_busy_s() -> float | None:
    """Return the processor seconds that other programs have used since the machine started."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    ticks = user + nice + system + irq + softirq + steal
    own = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system


def flush_caches() -> None:
    """Write to more memory than the caches hold, with every thread, so that what comes next starts cold."""
    _ballast().add_(1)


@cache
def _ballast() -> Tensor:
    return torch.zeros(max(64 * 2**20, 2 * _largest_cache()) // 8, dtype=torch.int64)


def _largest_cache() -> int:
    """Return the bytes of the last-level cache, 0 where the system does not tell."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [re.fullmatch(r"(\d+)([KMG])", file.read_text().strip()) for file in files]
    return max((int(size[1]) * units[size[2]] for size in sizes if size), default=0)
