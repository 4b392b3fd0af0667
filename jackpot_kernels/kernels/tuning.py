"""Short lists of configurations, and which of them is the fastest on a device: timed once, then remembered.

The choice is kept in memory, and on disk in ``$JACKPOT_CACHE`` or ``~/.cache/jackpot_kernels``.
"""

import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from jackpot_kernels.kernels.availability import has_copy_engine, interpreting

# Launches that are timed for each configuration, after one that compiles it.
_REPEATS = 7
# Writes of twice the L2 before each, to keep the device busy: with 4 of them a split product, which is two
# launches from Python, was timed by the host, and one launch that took a third longer was chosen.
_FLUSHES = 16


# Behind a kind of problem: its configurations for Hopper and what came after it.
HOPPER = ", Hopper"


@dataclass(frozen=True)
class Config:
    """Values of a kernel's constexpr parameters, and how Triton schedules it."""

    values: dict[str, int]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        # A sum and a product may be fused: Triton warns where nobody says so.
        return self.values | {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


@dataclass(frozen=True)
class Variant:
    """One way in which a kernel is compiled, so that it can be compiled ahead of time, without a device."""

    name: str
    kernel: Any
    signature: dict[str, str]  # type of each parameter, "constexpr" of constants
    constants: dict[str, Any]  # besides those of ``config``
    config: Config
    multiples_of_16: tuple[str, ...] = ()  # parameters; of pointers the address
    tensor_cores: bool = True  # whether it multiplies with them
    minimum_architecture: int = 80


# By kernel, device and problem: looked up at every launch, so without a word to spell.
_chosen: dict[tuple[Any, ...], Config] = {}


def choose(op: str, key: tuple[Any, ...], configs: Sequence[Config], run: Callable[[Config], None]) -> Config:
    """Return the fastest configuration for a problem; the first where nothing can be timed.

    Args:
        op: the kernel's name.
        key: what the choice depends on besides the device: dtype, shape.
        configs: the candidates; one that the device has no room for is passed over.
        run: launches the kernel; called several times for each candidate, so it must bear repetition.
    """
    if len(configs) == 1 or interpreting():
        return configs[0]
    place = (op, torch.cuda.current_device(), key)
    if place not in _chosen:
        name = _entry_name(op, key)
        config = _on_disk(name, configs)
        if config is None:
            if torch.cuda.is_current_stream_capturing():
                return configs[0]
            config = _fastest(configs, run)
            _remember(name, config)
        _chosen[place] = config
    return _chosen[place]


def listed(table: Mapping[str, list[Config]], kind: str, device: torch.device) -> list[Config]:
    """Return a table's configurations for a kind of problem; of those for Hopper, where the device is one."""
    return table.get(kind + HOPPER, table[kind]) if has_copy_engine(device) else table[kind]


def cache_file() -> Path:
    """Return where choices are kept."""
    folder = os.environ.get("JACKPOT_CACHE") or "~/.cache/jackpot_kernels"
    return Path(folder).expanduser() / "tuning.json"


def cache_facts() -> dict[str, Any]:
    """Return the cache's ``path``, how many ``entries`` it has, and the ``devices`` they were timed on."""
    entries = _read()
    devices = sorted({json.loads(name)[1] for name in entries})
    return {"path": str(cache_file()), "entries": len(entries), "devices": devices}


def _entry_name(op: str, key: tuple[Any, ...]) -> str:
    import triton

    return json.dumps([op, torch.cuda.get_device_name(), triton.__version__, *map(str, key)])


def _fastest(configs: Sequence[Config], run: Callable[[Config], None]) -> Config:
    from triton.runtime.errors import OutOfResources

    timed: list[tuple[float, Config]] = []
    for config in configs:
        try:
            timed.append((_median_ms(run, config), config))
        except OutOfResources:
            if config is configs[-1] and not timed:
                raise
    return min(timed, key=itemgetter(0))[1]


def _median_ms(run: Callable[[Config], None], config: Config) -> float:
    run(config)
    flush = _flusher()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        start.record()
        run(config)
        end.record()
        times.append((start, end))
    end.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times)


def _flusher() -> Callable[[], None]:
    """Return a function that empties L2, as other layers do, and keeps the device busy meanwhile.

    Otherwise weights would be timed from L2, and a short kernel by how long the host takes to launch it.
    """
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    buffer = torch.empty(2 * size, dtype=torch.uint8, device="cuda")

    def flush() -> None:
        for _ in range(_FLUSHES):
            buffer.zero_()

    return flush


def _on_disk(name: str, configs: Sequence[Config]) -> Config | None:
    """Return the configuration that is remembered, if it is still among the candidates."""
    entry = _read().get(name)
    return next((config for config in configs if asdict(config) == entry), None)


def _read() -> dict[str, Any]:
    path = cache_file()
    try:
        entries = json.loads(path.read_text())
        if not isinstance(entries, dict):
            raise ValueError("it holds no JSON object")
        for name in entries:
            _op, device, *_ = json.loads(name)
            if not isinstance(device, str):
                raise ValueError(f"{name} names no device")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"the tuning cache {path} is ignored: {error}", stacklevel=2)
        return {}
    return entries


def _remember(name: str, config: Config) -> None:
    """Add an entry; of two processes that add at once, one may have to time its entry again later."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, suffix=".json")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(_read() | {name: asdict(config)}, file, indent=1)
            os.replace(beside, path)
        except BaseException:
            os.unlink(beside)
            raise
    except OSError as error:
        warnings.warn(f"the tuning cache {path} cannot be written: {error}", stacklevel=2)
