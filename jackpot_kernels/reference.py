"""The definition: every operation of a jackpot search in plain PyTorch, slow and obvious.

Equation numbers are those of Zhang et al., "Lottery Jackpots Exist in Pre-trained Models" (arXiv 2104.08700).
Tests, benchmarks and ``backend="reference"`` use this file; the kernels must give the same bits.

One total order decides everything: *a ranks above b when its score is larger, or the scores are equal and its
position is lower*. The position is the logical row-major index; where several layers form one segment, the
layer's place in the list comes first. -0 equals +0, and NaN ranks greatest.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Multipliers of the hash that draws random pairs: an odd constant for each argument, then a 64-bit mixer.
_HASH_SEED, _HASH_STEP = 0x2545F4914F6CDD1D, 0x9E3779B97F4A7C15
_HASH_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask into int32 words, 32 weights a word, lowest bit first; padding bits are 0."""
    bits = F.pad(mask.reshape(-1).to(torch.int64), (0, -mask.numel() % 32)).view(-1, 32)  # [W, 32]
    words = (bits << torch.arange(32, device=mask.device)).sum(1)  # [W]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_mask(words: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the bool mask of the given shape, contiguous, that ``pack_mask`` packed into ``words``."""
    bits = (words.view(-1, 1) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1  # [W, 32]
    return bits.view(-1)[: math.prod(shape)].to(torch.bool).view(tuple(shape))


def effective_weight(weight: Tensor, words: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``weight * mask`` (Eq. 4) in ``dtype`` and the weight's strides; pruned elements are +0."""
    kept = torch.where(unpack_mask(words, weight.shape), weight, torch.zeros_like(weight))
    return torch.empty_like(weight, dtype=dtype or weight.dtype).copy_(kept)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return ``a * b + c`` of float32 tensors with one rounding.

    The product is exact in float64; the sum is rounded to odd there, which makes the last rounding to
    float32 exact.
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    carried = total - product
    error = (product - (total - carried)) + (c - carried)
    bits = total.view(torch.int64)
    toward_error = torch.where((error > 0) == (total > 0), bits + 1, bits - 1)
    to_odd = (error != 0) & ((bits & 1) == 0) & total.isfinite()
    return torch.where(to_odd, toward_error, bits).view(torch.float64).float()


def score_update_(
    scores: Sequence[Tensor],
    momenta: Sequence[Tensor],
    grads: Sequence[Tensor],
    hyper: Tensor,
    control: Tensor,
    *,
    found_inf: Tensor | None = None,
    multiply_add: Callable[[Tensor, Tensor, Tensor], Tensor] = fma,
) -> None:
    """SGD on the scores of all layers (Eq. 6, 18), or nothing at all when any gradient is not finite.

    g = grad * inv_scale + weight_decay * s;  m = momentum * m + g;
    s = s - lr * (g + momentum * m if nesterov else m)

    Args:
        scores, momenta: float32, updated in place, one tensor a layer.
        grads: float32 of the same shapes; an empty tensor leaves its layer as it is.
        hyper: float32 [L, 5], rows of (lr, momentum, weight_decay, nesterov 0 or 1, inv_scale).  # [L, 5]
        control: int64 (steps taken, steps skipped, 1 if this step was skipped).  # [3]
        found_inf: float32 scalar of a GradScaler; anything but 0 skips the step.
        multiply_add: how ``a * b + c`` is rounded; the default rounds once.
    """
    finite = all(bool(grad.isfinite().all()) for grad in grads)
    if not finite or (found_inf is not None and bool(found_inf != 0)):
        control[1] += 1
        control[2] = 1
        return
    control[0] += 1
    control[2] = 0
    for s, m, grad, row in zip(scores, momenta, grads, hyper, strict=True):
        if grad.numel() == 0:
            continue
        lr, momentum, weight_decay, nesterov, inv_scale = row.unbind()
        g = multiply_add(weight_decay, s, grad * inv_scale)
        m.copy_(multiply_add(momentum, m, g))
        direction = multiply_add(momentum, m, g) if nesterov != 0 else m
        s.copy_(multiply_add(-lr, direction, s))


def _order(values: Tensor) -> Tensor:
    """Return the positions from the highest ranked to the lowest."""
    return torch.sort(values, descending=True, stable=True).indices


def _segments(tensors: Sequence[Tensor], joint: bool) -> list[Tensor]:
    """Flatten each tensor; joined into one segment when ``joint``."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    return [torch.cat(flat)] if joint else flat


def threshold(values: Sequence[Tensor], num_kept: Tensor, joint: bool = False) -> tuple[Tensor, Tensor]:
    """Return value and position of the ``num_kept``-th ranked element of each segment (Eq. 5, 28).

    Kept are the elements with ``value > t or (value == t and position <= i)``.

    Args:
        values: float32 tensors.
        num_kept: int64, at least 1 and at most the segment's size.  # [S]
        joint: one segment over all tensors instead of one for each.

    Returns:
        float32 thresholds and int64 positions.  # [S], [S]
    """
    segments = _segments(values, joint)
    index = torch.stack([_order(s)[k - 1] for s, k in zip(segments, num_kept.tolist(), strict=True)])
    value = torch.stack([s[i] for s, i in zip(segments, index, strict=True)])
    return value, index


def _hash(position: Tensor, step: int, seed: int) -> Tensor:
    """Return a 64-bit hash of (seed, step, position), ordered as unsigned when compared as signed."""

    def signed(value: int) -> int:
        return (value + 2**63) % 2**64 - 2**63

    h = position + signed(seed * _HASH_SEED + step * _HASH_STEP)
    for shift, factor in _HASH_MIX:
        h = (h ^ ((h >> shift) & (2 ** (64 - shift) - 1))) * signed(factor)
    return h ^ ((h >> 31) & (2**33 - 1)) ^ signed(2**63)


def _chosen(
    candidates: Tensor, order: Tensor, count: int, pairs: str, best_first: bool, step: int, seed: int
) -> Tensor:
    """Return the positions of the ``count`` candidates that swap, as ``pairs`` chooses them."""
    ranked = order[candidates[order]]  # best to worst
    if pairs == "random":
        return ranked[torch.sort(_hash(ranked, step, seed)).indices[:count]]
    if (pairs == "best") != best_first:
        ranked = ranked.flip(0)
    return ranked[:count]


def swap_(
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    num_kept: Tensor,
    schedule: Tensor,
    control: Tensor,
    *,
    weights: Sequence[Tensor] | None = None,
    effective: Sequence[Tensor] | None = None,
    joint: bool = False,
    pairs: str = "best",
    seed: int = 0,
) -> Tensor:
    """Exchange a share of the kept and pruned weights that the scores would exchange (Eq. 28-30).

    With ``t = control[0]`` and ``r, ramp = schedule[t - 1]``, each segment's target is its first
    ``K = K_last + ceil((K_first - K_last) * ramp)`` elements by the order, never more than are kept now.
    Of the ``n`` pruned elements inside the target, ``q = ceil(n * r)`` enter; of the kept ones outside
    it, ``q`` and the surplus over ``K`` leave.

    Args:
        scores: float32 tensors.
        masks: packed masks, changed in place.
        num_kept: int64 rows of (K_first, K_last).  # [S, 2]
        schedule: float64 rows of (rate, ramp), for t = 1 ... T.  # [T, 2]
        control: int64 (steps taken, steps skipped, 1 if this step was skipped); a skipped step swaps
            nothing.  # [3]
        weights, effective: where given and not empty, ``effective`` is made ``weight * mask`` again in place.
        joint: one segment over all tensors instead of one for each.
        pairs: "best" takes the highest ranked of entering and the lowest ranked of leaving, "inverse" the
            other ends, "random" the smallest hashes of (seed, t, position).

    Returns:
        int64 rows of (n, entered, left, bits of the float32 threshold, 0).  # [S, 5]
    """
    segments = _segments(scores, joint)
    stats = torch.zeros(len(segments), 5, dtype=torch.int64, device=control.device)
    step, _, skipped = control.tolist()
    if skipped:
        return stats
    rate, ramp = schedule[step - 1].tolist()
    kept = [unpack_mask(words, score.shape) for words, score in zip(masks, scores, strict=True)]
    segment_masks = _segments(kept, joint)
    rows = zip(stats, segments, segment_masks, num_kept.tolist(), strict=True)
    for row, values, mask, (first, last) in rows:
        now = int(mask.sum())
        k = min(now, last + math.ceil((first - last) * ramp))
        order = _order(values)
        target = torch.zeros_like(mask)
        target[order[:k]] = True
        proposed = int((target & ~mask).sum())
        q = math.ceil(proposed * rate)
        entering = _chosen(target & ~mask, order, q, pairs, True, step, seed)
        leaving = _chosen(mask & ~target, order, q + now - k, pairs, False, step, seed)
        mask[entering] = True
        mask[leaving] = False
        bits = values[order[k - 1]].view(torch.int32)
        row.copy_(torch.tensor([proposed, entering.numel(), leaving.numel(), int(bits), 0]))
    if joint:
        parts = segment_masks[0].split([s.numel() for s in scores])
        kept = [part.view_as(s) for part, s in zip(parts, scores, strict=True)]
    for words, mask in zip(masks, kept, strict=True):
        words.copy_(pack_mask(mask))
    for weight, cached, words in zip(weights or (), effective or (), masks, strict=bool(weights)):
        if cached.numel():
            cached.copy_(effective_weight(weight, words, cached.dtype))
    return stats


def search_step_(
    scores: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    grads: Sequence[Tensor],
    hyper: Tensor,
    num_kept: Tensor,
    schedule: Tensor,
    control: Tensor,
    *,
    found_inf: Tensor | None = None,
    multiply_add: Callable[[Tensor, Tensor, Tensor], Tensor] = fma,
    **how: Any,
) -> Tensor:
    """A whole step of the search (Algorithm 1): ``score_update_``, then ``swap_``, whose result it returns.

    Args:
        how: keyword arguments of ``swap_``.
    """
    score_update_(scores, momenta, grads, hyper, control, found_inf=found_inf, multiply_add=multiply_add)
    return swap_(scores, masks, num_kept, schedule, control, **how)


def score_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Return dL/d(scores) = dL/d(weight * mask) * weight in float32, for pruned weights too (Eq. 6, 18)."""
    return grad.float() * weight.float()


class StraightThrough(torch.autograd.Function):
    """``weight * mask`` whose gradient reaches every score: dL/d(scores) = dL/d(weight * mask) * weight
    (Eq. 6, 18)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return torch.where(mask, weight, torch.zeros_like(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        weight, mask = ctx.saved_tensors
        return grad * mask if ctx.needs_input_grad[0] else None, score_grad(grad, weight), None


def masked_linear(
    x: Tensor, weight: Tensor, scores: Tensor, mask: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``x @ (weight * mask).T + bias`` (Eq. 4) with the straight-through gradient of the scores (Eq. 6)."""
    return F.linear(x, StraightThrough.apply(weight, scores, mask).to(x.dtype), bias)


def masked_conv(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor:
    """Convolution of one, two or three dimensions with ``weight * mask`` (Eq. 4, 6)."""
    effective = StraightThrough.apply(weight, scores, mask).to(x.dtype)
    no_output_padding = (0,) * (x.dim() - 2)
    return torch.convolution(x, effective, bias, stride, padding, dilation, False, no_output_padding, groups)
