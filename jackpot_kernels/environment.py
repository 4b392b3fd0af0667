"""What is installed, what was built, and what can run here."""

import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from jackpot_kernels import _extension
from jackpot_kernels.kernels.availability import interpreting, why_not
from jackpot_kernels.kernels.tuning import cache_facts


def environment() -> dict[str, Any]:
    """Return the facts that tell one machine from another: versions, build, processor, GPUs, backends.

    Each fact is looked up on its own: where one cannot be had, its entry is a string that says why.

    Returns:
        A dict that JSON can hold: ``versions`` (package to version), ``extension`` (``path`` and what it was
        built from), ``cpu`` (``machine``, ``processor``, ``capability``, ``threads``), ``cuda``
        (``torch_built_for``, ``available``, ``devices``), ``backends`` (name to where it runs, or why it does
        not) and ``tuning`` (``path`` of the kernels' tuning cache, number of ``entries``, ``devices`` that
        were timed).
    """
    probes: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "extension": lambda: {"path": str(_extension.LIBRARY)} | _extension.build_facts(),
        "cpu": _cpu,
        "cuda": _cuda,
        "backends": _backends,
        "tuning": cache_facts,
    }
    return {name: _guarded(probe) for name, probe in probes.items()}


def _guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _versions() -> dict[str, str]:
    packages = {name: _installed(name) for name in ("jackpot_kernels", "triton", "numpy", "safetensors")}
    return {"python": platform.python_version(), "torch": torch.__version__} | packages


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "processor": _guarded(_processor),
        "capability": _guarded(torch.ops.jackpot.cpu_capability),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """Return the processor's name, with family and model: a virtual machine's brand may tell neither."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in told:
        return platform.processor() or "unknown"
    family = (
        f"{word} {told[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in told
    )
    return " ".join([told["model name"], *family])


def _cuda() -> dict[str, Any]:
    available = torch.cuda.is_available()
    devices = range(torch.cuda.device_count()) if available else ()
    return {
        "torch_built_for": torch.version.cuda,
        "available": available,
        "devices": [_guarded(partial(torch.cuda.get_device_name, i)) for i in devices],
    }


def _backends() -> dict[str, str]:
    cuda = torch.cuda.is_available()
    here = "runs on cpu and cuda" if cuda else "runs on cpu"
    without = "runs on cpu, not on cuda: the extension was built without CUDA kernels"
    return {
        "dense": without if cuda and not _extension.build_facts()["cuda_archs"] else here,
        "fused": _guarded(_fused),
        "mixed": _guarded(_fused),
        "reference": here,
    }


def _fused() -> str:
    reason = why_not(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if reason:
        return f"does not run: {reason}"
    return "runs on cpu and cuda, in Triton's interpreter" if interpreting() else "runs on cuda"
