"""Loads the compiled extensions, and refuses one that is missing or was built from other sources."""

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("_C.abi3.so")
CUDA_LIBRARY = Path(__file__).with_name("_C_cuda.abi3.so")
CHECKOUT = Path(__file__).parent.parent
OLDEST_TORCH = (2, 10)
SOURCE_SUFFIXES = {".h", ".cpp", ".cuh", ".cu"}


def source_digest(csrc: Path) -> str:
    """Return the SHA-256 over names and contents of all sources under ``csrc``, in the order of the names."""
    digest = hashlib.sha256()
    names = sorted(
        path.relative_to(csrc).as_posix() for path in csrc.rglob("*") if path.suffix in SOURCE_SUFFIXES
    )
    for name in names:
        content = (csrc / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def require_torch(installed: str) -> None:
    """Raise ImportError where torch is older than the stable interface that the extension is built on."""
    major, minor = (int(part) for part in installed.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        raise ImportError(
            f"jackpot_kernels needs torch >= 2.10, got {installed}: run `pip install 'torch>=2.10'`"
        )


def build_facts() -> dict[str, Any]:
    """Return what was built: ``version``, ``digest``, ``compiler``, ``torch`` and ``cuda_archs``."""
    facts: dict[str, Any] = json.loads(torch.ops.jackpot.build_facts())
    return facts


def load() -> None:
    """Load the compiled extension and register its operators; a second call only checks again.

    The CUDA kernels follow where they were built and this torch has CUDA; that starts nothing on a device.

    Raises:
        ImportError: torch is too old, or the extension is missing, cannot be loaded, or was built for another
            version or from other sources than those beside the package.
    """
    require_torch(torch.__version__)
    facts = _load_library(LIBRARY)
    _require_fresh(facts)
    if facts["cuda_archs"] and torch.version.cuda is not None:
        _load_library(CUDA_LIBRARY)


def _load_library(library: Path) -> dict[str, Any]:
    if not library.is_file():
        raise ImportError(f"jackpot_kernels has no compiled extension at {library}: {_remedy()}")
    try:
        torch.ops.load_library(str(library))
        return build_facts()
    except (OSError, AttributeError, ValueError) as error:
        # Newer torch hides what the linker said behind a sentence of its own.
        raise ImportError(
            f"the compiled extension {library} cannot be loaded ({error.__cause__ or error}): {_remedy()}"
        ) from error


def _require_fresh(facts: dict[str, Any]) -> None:
    try:
        wanted = version("jackpot_kernels")
    except PackageNotFoundError:
        raise ImportError(f"jackpot_kernels is on the path but not installed: {_remedy()}") from None
    if facts["version"] != wanted:
        built = facts["version"]
        raise ImportError(f"the compiled extension is stale, built for {built} and not {wanted}: {_remedy()}")
    if _in_checkout() and facts["digest"] != source_digest(CHECKOUT / "csrc"):
        raise ImportError(
            f"the compiled extension is stale, {CHECKOUT / 'csrc'} has changed since: {_remedy()}"
        )


def _in_checkout() -> bool:
    return (CHECKOUT / "setup.py").is_file() and (CHECKOUT / "csrc").is_dir()


def _remedy() -> str:
    if _in_checkout():
        return f"run `pip install --no-build-isolation -e .` in {CHECKOUT}"
    return "run `pip install --no-build-isolation .` in a checkout of jackpot_kernels"
