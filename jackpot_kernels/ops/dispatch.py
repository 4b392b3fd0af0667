"""Which backend runs a masked matmul or convolution: a person's wish, or rules measured on the device.

A wish is, from the strongest: the argument ``backend``, ``use_backend``, the environment variable
``JACKPOT_BACKEND``, which ``torch.compile`` reads as it traces. Where nobody wishes, ``RULES`` decide, and
``dense`` where they say nothing.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jackpot_kernels._validate import require_choice
from jackpot_kernels.kernels.availability import why_not

BACKENDS = ("auto", "fused", "mixed", "dense", "reference")


class Problem(NamedTuple):
    """What a rule may ask about; of a convolution, ``tokens`` are the positions of its input."""

    tokens: int
    rows: int  # outputs
    columns: int  # inputs of one group
    window: tuple[int, ...]  # () of a matmul
    groups: int
    dtype: torch.dtype


class Rule(NamedTuple):
    """The backend of the problems for which ``when`` holds."""

    backend: str
    when: Callable[[Problem], bool]


# Pattern of a device's name, then operation, to rules of which the first that holds decides. A rule stands
# here because of a measurement on that device (`python -m benchmarks.bench_masked_layers --rules`).
RULES: dict[str, dict[str, tuple[Rule, ...]]] = {
    "NVIDIA H100*": {
        # Forward and backward of 4096 x 4096 weights, 64 tokens: mixed 72 us, fused 86, eager 120, dense 157.
        # Of these the product that the scores' gradient ends with was 100, whose bytes take 46, and which
        # is a kernel of its own since: with that, 4096 tokens would gain nothing. Fewer weights were not
        # measured.
        "masked_linear": (
            Rule(
                "mixed",
                lambda p: p.dtype.itemsize == 2 and p.tokens <= 1024 and p.rows * p.columns >= 2**19,
            ),
        ),
        # The first layer of VGG-19 on 256 images of 32 x 32, forward and backward: mixed 274 us, dense 295,
        # eager 301. Dense is as fast or faster with 7 x 7 windows and from 32 inputs on; with 32 outputs
        # mixed took 1.07 and 0.97 times as long.
        "masked_conv": (
            Rule(
                "mixed",
                lambda p: (
                    p.dtype.itemsize == 2
                    and p.tokens >= 2**17
                    and p.groups == 1
                    and p.columns <= 4
                    and p.rows >= 64
                    and p.window == (3, 3)
                ),
            ),
        ),
    },
}

# One for the process, not for the thread: autograd runs a checkpointed layer's forward again in its own.
_wish = "auto"


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Let masked matmuls and convolutions in a ``with`` block use a backend, where no argument names one.

    A backward pass uses the backend of its forward pass, also after the block; under activation checkpointing
    it runs the forward again, so it belongs inside the block.

    Args:
        backend: "auto", "fused", "mixed", "dense" or "reference".

    Raises:
        ValueError: ``backend`` is unknown.
    """
    global _wish
    require_choice("backend", backend, BACKENDS)
    before, _wish = _wish, backend
    try:
        yield
    finally:
        _wish = before


def choose_backend(
    op: str, backend: str, available: Collection[str], x: Tensor, weight: Tensor, groups: int = 1
) -> str:
    """Return the backend to use, with ``auto`` decided.

    Args:
        op: the operation's name in ``RULES``.
        backend: the argument of the same name.
        available: the backends that the operation has besides ``reference``.
        x, weight, groups: the operands, still unchecked.

    Raises:
        ValueError: a backend is unknown, or not among ``available``.
    """
    require_choice("backend", backend, BACKENDS)
    if backend == "auto":
        backend = _wish
    if backend == "auto":
        backend = os.environ.get("JACKPOT_BACKEND") or "auto"
        require_choice("the environment variable JACKPOT_BACKEND", backend, BACKENDS)
    if backend == "auto":
        # Dynamo can call the functions in a rule because it has seen the table that they come from.
        return _by_rules(op, x, weight, groups) if RULES else "dense"
    if backend == "reference" or backend in available:
        return backend
    names = ", ".join(("auto", *available, "reference"))
    raise ValueError(f"backend must be one of {names} for {op}, got {backend!r}")


def _by_rules(op: str, x: Any, weight: Any, groups: int) -> str:
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and weight.dim() > 1):
        return "dense"
    if not isinstance(groups, int) or groups < 1:
        return "dense"
    rules = _rules_of(str(weight.device))
    if rules is None:
        return "dense"
    rows, columns, *window = weight.shape
    tokens = x.numel() // (columns * groups)
    problem = Problem(tokens, rows, columns, tuple(window), groups, x.dtype)
    return decide(rules.get(op, ()), problem)


def decide(rules: Iterable[Rule], problem: Problem) -> str:
    """Return the backend that rules give a problem."""
    return next((rule.backend for rule in rules if rule.when(problem)), "dense")


def rules_for(name: str) -> dict[str, tuple[Rule, ...]]:
    """Return the rules of a device of that name, by operation."""
    return next((rules for pattern, rules in RULES.items() if fnmatch(name, pattern)), {})


def _rules_of(device: str) -> dict[str, tuple[Rule, ...]] | None:
    """Return the rules of a device; None where there are none or the kernels cannot run.

    Not an empty dict, which Dynamo cannot trace as a constant.
    """
    if device not in _rules_found:
        found = rules_for(torch.cuda.get_device_name(device) if device.startswith("cuda") else device)
        _rules_found[device] = found if found and why_not(torch.device(device)) is None else None
    return _rules_found[device]


_rules_found: dict[str, dict[str, tuple[Rule, ...]] | None] = {}
# Dynamo then asks once and traces nothing inside; `torch.compiler.assume_constant_result` does the same, but
# imports the compiler.
_rules_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
