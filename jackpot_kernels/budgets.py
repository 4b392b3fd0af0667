"""Budgets: how many weights each masked layer keeps."""

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from numbers import Integral, Real

import torch
from torch import Tensor

from jackpot_kernels.ops.threshold import threshold

Budget = Callable[[Mapping[str, Tensor], float], dict[str, int]]


def num_pruned(sparsity: float, numel: int) -> int:
    """Return ``ceil(sparsity * numel)``, the fraction taken as it is written: 0.9 of 100 is 90.

    Raises:
        TypeError: when ``sparsity`` is no number.
        ValueError: when ``sparsity`` is NaN or outside [0, 1).
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real):
        raise TypeError(f"sparsity must be a number, got {type(sparsity).__name__}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    # The nearest float64 to 0.9 is a little above it, and would prune 91 of 100.
    return math.ceil(Fraction(str(sparsity)) * numel)


def kept_masks(importance: Sequence[Tensor], num_kept: Sequence[int], joint: bool = False) -> list[Tensor]:
    """Return the masks of the first ``num_kept`` weights (Eq. 5): larger first, ties lowest logical index.

    Args:
        importance: float32, contiguous, one tensor a layer.
        num_kept: counts, each at least 1: one a layer, or one in all when ``joint``.
        joint: rank over all layers, the layer's position first among equals.

    Returns:
        bool tensors of the same shapes.
    """
    counts = torch.tensor(num_kept, dtype=torch.int64, device=importance[0].device)
    values, indices = threshold(importance, counts, joint)
    values = _ordered(values)
    masks, start = [], 0
    for i, tensor in enumerate(map(_ordered, importance)):
        segment = 0 if joint else i
        position = torch.arange(start, start + tensor.numel(), device=tensor.device).view_as(tensor)
        tie = (tensor == values[segment]) & (position <= indices[segment])
        masks.append((tensor > values[segment]) | tie)
        start += tensor.numel() if joint else 0
    return masks


def _ordered(values: Tensor) -> Tensor:
    """Return integers in the order of values that are numbers, the same for -0 and 0.

    Under ``torch.set_flush_denormal`` the CPU takes subnormal values for 0: one as threshold kept them all.
    """
    bits = values.view(torch.int32)
    return torch.where(bits < 0, -(2**31) - bits, bits)


def global_(importance: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Count what each layer keeps of one selection over all layers.

    A layer that would keep none keeps its best. The counts add up to ``numel - ceil(sparsity * numel)``, or
    to one a layer where that is more.

    Args:
        importance: float32 tensor of each layer, finite; the weights that rank first are kept.
        sparsity: fraction of all these weights to remove, in [0, 1).
    """
    tensors = list(importance.values())
    total = _num_kept(importance, sparsity)
    counts = _joint_counts(tensors, total)
    if not _warn_of_empty_layers(dict(zip(importance, counts, strict=True))):
        return dict(zip(importance, counts, strict=True))
    best_first = [tensor.clone() for tensor in tensors]
    for tensor in best_first:
        tensor.view(-1)[tensor.argmax()] = math.inf
    counts = _joint_counts(best_first, max(total, len(tensors)))
    return dict(zip(importance, counts, strict=True))


def _joint_counts(tensors: Sequence[Tensor], total: int) -> list[int]:
    if total == 0:
        return [0] * len(tensors)
    return [int(mask.sum()) for mask in kept_masks(tensors, [total], joint=True)]


def uniform(importance: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Give every layer the same sparsity: ``numel - ceil(sparsity * numel)`` weights, at least one."""
    counts = {name: t.numel() - num_pruned(sparsity, t.numel()) for name, t in importance.items()}
    _warn_of_empty_layers(counts)
    return {name: max(count, 1) for name, count in counts.items()}


def erk(importance: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Erdős-Rényi-kernel: a layer's density is in proportion to the sum of its dimensions over their product.

    A layer that would pass density 1 is kept whole and the others share the rest. The counts add up to
    ``numel - ceil(sparsity * numel)``, or to one a layer where that is more; where shares have equal
    fractions the earlier layer gets the odd weight.
    """
    shares = [sum(t.shape) for t in importance.values()]
    sizes = [t.numel() for t in importance.values()]
    total = _num_kept(importance, sparsity)
    counts = _apportion(total, shares, sizes, floor=0)
    if _warn_of_empty_layers(dict(zip(importance, counts, strict=True))):
        counts = _apportion(max(total, len(sizes)), shares, sizes, floor=1)
    return dict(zip(importance, counts, strict=True))


# "magnitude" is one global selection, too, but by magnitude whatever the criterion.
BUDGETS: Mapping[str, Budget] = {"global": global_, "magnitude": global_, "uniform": uniform, "erk": erk}


def given(importance: Mapping[str, Tensor], num_kept: Mapping[str, int]) -> dict[str, int]:
    """Check the counts that a person gives: every layer is named, and keeps one to all of its weights.

    Raises:
        TypeError: when a count is no integer.
        ValueError: when a name is unknown or missing, or a count out of range.
    """
    for name in num_kept:
        if name not in importance:
            raise ValueError(f"budget must name masked layers, got {name!r}")
    for name, tensor in importance.items():
        if name not in num_kept:
            raise ValueError(f"budget must name every masked layer, got none for {name!r}")
        _require_count(f"budget of {name!r}", num_kept[name], 1, tensor.numel())
    return {name: int(num_kept[name]) for name in importance}


def scale_budget(num_kept: Mapping[str, int], target_total: int) -> dict[str, int]:
    """Shrink a budget to ``target_total`` weights in proportion, by largest remainder.

    Each layer keeps at least one. No count rises; where remainders are equal the earlier layer gets the odd
    weight.

    Raises:
        TypeError: when a count is no integer.
        ValueError: when a count is below one, or ``target_total`` below one a layer or above the sum.
    """
    for name, count in num_kept.items():
        _require_count(f"num_kept of {name!r}", count, 1, None)
    counts = list(num_kept.values())
    _require_count("target_total", target_total, len(counts), sum(counts))
    return dict(zip(num_kept, _apportion(target_total, counts, counts, floor=1), strict=True))


def _require_count(what: str, count: int, least: int, most: int | None) -> None:
    if isinstance(count, bool) or not isinstance(count, Integral):
        raise TypeError(f"{what} must be an integer, got {type(count).__name__}")
    if count < least or (most is not None and count > most):
        wanted = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{what} must be {wanted}, got {count}")


def _num_kept(importance: Mapping[str, Tensor], sparsity: float) -> int:
    numel = sum(tensor.numel() for tensor in importance.values())
    return numel - num_pruned(sparsity, numel)


def _warn_of_empty_layers(num_kept: Mapping[str, int]) -> bool:
    empty = [name for name, count in num_kept.items() if count == 0]
    if empty:
        message = f"the budget leaves no weight in {', '.join(map(repr, empty))}; each keeps its best one"
        # The caller of initialize, which calls a budget through one function of its own.
        warnings.warn(message, stacklevel=5)
    return bool(empty)


def _apportion(total: int, shares: Sequence[int], caps: Sequence[int], floor: int) -> list[int]:
    """Split ``total`` in proportion to ``shares``, each part within [floor, cap], by largest remainder."""

    pairs = list(zip(shares, caps, strict=True))

    def parts(scale: Fraction) -> list[Fraction]:
        return [min(max(scale * share, Fraction(floor)), Fraction(cap)) for share, cap in pairs]

    def filled(scale: Fraction) -> Fraction:
        return sum(parts(scale), Fraction(0))

    # The sum of the parts is piecewise linear in the scale and bends where a part meets a bound.
    bends = sorted({Fraction(bound, share) for share, cap in pairs for bound in (floor, cap)})
    upper = bisect_left(bends, Fraction(total), key=filled)
    scale = bends[upper]
    if upper:
        low, high = bends[upper - 1], bends[upper]
        scale = low + (high - low) * (total - filled(low)) / (filled(high) - filled(low))
    exact = parts(scale)
    counts = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
