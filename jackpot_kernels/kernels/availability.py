"""Where the Triton kernels can run."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

# Older devices have no bfloat16 tensor cores and no asynchronous copies, and no kernel was compiled for them.
MINIMUM_CAPABILITY = (8, 0)


class BackendUnavailableError(RuntimeError):
    """The kernels cannot run where they were asked to."""


def interpreting() -> bool:
    """Tell whether kernels run in Triton's interpreter, as they do for ``TRITON_INTERPRET=1``."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def why_not(device: torch.device) -> str | None:
    """Return what is missing for the kernels to run on tensors of ``device``, or None if nothing is."""
    if find_spec("triton") is None:
        return "triton is not installed: run `pip install triton`"
    if interpreting():
        return None
    if device.type != "cuda":
        return (
            f"it needs CUDA tensors, or TRITON_INTERPRET=1 in the environment, got tensors on {device.type}"
        )
    return _too_old(device)


@functools.cache
def _too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= MINIMUM_CAPABILITY:
        return None
    wanted, got = (".".join(map(str, c)) for c in (MINIMUM_CAPABILITY, capability))
    name = torch.cuda.get_device_name(device)
    return f"it needs a device of compute capability {wanted} or more, got {name} with {got}"


def has_copy_engine(device: torch.device) -> bool:
    """Tell whether a device copies tiles of tensors by itself: Hopper, later ones, and the interpreter."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)


def require_available(device: torch.device) -> None:
    """Raise BackendUnavailableError, which says what is missing, where the kernels cannot run."""
    reason = why_not(device)
    if reason:
        raise BackendUnavailableError(f'backend="fused" cannot run: {reason}')


@contextmanager
def launching_on(device: torch.device) -> Iterator[None]:
    """Make ``device`` the one that Triton launches on."""
    if device.type == "cpu":
        yield
        return
    with torch.cuda.device(device):
        yield
