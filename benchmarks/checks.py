"""That contenders do the same work; asserted before anything is timed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.searches import State

# A baseline that rounds otherwise than the definition may swap other weights at the edges, this share of all.
OTHER_SWAPS = 0.1


def require_same(name: str, got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Check that tensors are equal, bit for bit."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if not torch.equal(a, b):
            raise AssertionError(f"{name} {i} must equal the reference bit for bit, but differs")


def require_close(name: str, got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Check that tensors are equal but for rounding."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if not torch.allclose(a, b, rtol=1e-5, atol=1e-6):
            raise AssertionError(f"{name} {i} must be close, but differs by {(a - b).abs().max().item()}")


def require_same_state(got: State, expected: State) -> None:
    """Check that a step wrote the same, bit for bit."""
    for name in ("scores", "momenta", "masks", "effective"):
        require_same(name, getattr(got, name), getattr(expected, name))


def require_same_statistics(got: Tensor, expected: Tensor) -> None:
    """Check the rows of ``swap_`` but for the last column, which says how they were found."""
    require_same("statistics", [got[:, :4]], [expected[:, :4]])


def require_same_swaps(got: State, expected: State, before: State) -> None:
    """Check that a baseline came from ``before`` to the same scores and nearly the same effective weights."""
    require_close("scores", got.scores, expected.scores)
    other = _num_differing(got.effective, expected.effective)
    swapped = _num_differing(before.effective, expected.effective)
    if other > OTHER_SWAPS * swapped:
        raise AssertionError(f"effective weights must differ in few of {swapped} swaps, got {other}")


def _num_differing(a: Sequence[Tensor], b: Sequence[Tensor]) -> int:
    return sum(int((x != y).sum()) for x, y in zip(a, b, strict=True))
