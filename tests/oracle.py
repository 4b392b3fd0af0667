"""The search step of arXiv 2104.08700 written a second time, in NumPy, to judge the package by.

Nothing here comes from `jackpot_kernels`: rounding is proved against exact fractions, selection is a sort.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
Row = tuple[float, float, float, bool, float]  # lr, momentum, weight_decay, nesterov, inv_scale


def round_to_float32(value: Fraction) -> float:
    """The float32 nearest to a fraction, ties to even, from integer arithmetic alone."""
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(magnitude / unit) * unit
    return math.copysign(math.inf if rounded >= 2**128 else float(rounded), value)


def fma(a: Float32 | np.float32, b: Float32, c: Float32) -> Float32:
    """a * b + c in float32 with one rounding.

    The product is exact in float64; the sum is rounded to odd, which the rounding to float32 cannot spoil.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        addend = np.asarray(c, np.float64)
        total = np.asarray(product + addend)
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)
        inexact = np.isfinite(total) & (error != 0)
        even = (total.view(np.int64) & 1) == 0
        neighbour = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        return np.where(inexact & even, neighbour, total).astype(np.float32)


def update(scores: Float32, momentum: Float32, grad: Float32, row: Row) -> tuple[Float32, Float32]:
    """One SGD step on the scores, each operation rounded once to float32: the new scores and momentum."""
    lr, mu, decay, nesterov, inv_scale = row
    g = grad * np.float32(inv_scale)
    g = fma(np.float32(decay), scores, g)
    m = fma(np.float32(mu), momentum, g)
    d = fma(np.float32(mu), m, g) if nesterov else m
    return fma(-np.float32(lr), d, scores), m


def ranking(scores: Float32) -> NDArray[np.int64]:
    """Positions from first to last: NaN, then larger scores first; the lower position first among equals."""
    nan = np.isnan(scores)
    descending = np.where(nan, np.float32(0), -scores)
    return np.lexsort((np.arange(scores.size), descending, ~nan))


def threshold(scores: Float32, num_kept: int) -> tuple[float, int]:
    """Score and position of the last of the first `num_kept`."""
    last = ranking(scores)[num_kept - 1]
    return float(scores[last]), int(last)


def mixed(seed: int, step: int, position: int) -> int:
    """The 64-bit hash by which random pairs are drawn, in unbounded integers."""
    h = (position + seed * 0x2545F4914F6CDD1D + step * 0x9E3779B97F4A7C15) % 2**64
    h = ((h ^ h >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    h = ((h ^ h >> 27) * 0x94D049BB133111EB) % 2**64
    return h ^ h >> 31


@dataclass
class Swap:
    """What one swap did to one segment."""

    proposed: int
    entered: int
    left: int
    threshold: float
    mask: Bool


def swap(scores: Float32, mask: Bool, num_kept: int, rate: float, pairs: str, seed: int, step: int) -> Swap:
    """The restricted swap of one segment (Eq. 28-30) towards its first `num_kept` positions."""
    order = ranking(scores)
    target = np.zeros_like(mask)
    target[order[:num_kept]] = True
    entering = order[(target & ~mask)[order]].tolist()  # best first
    leaving = order[(mask & ~target)[order]].tolist()[::-1]  # worst first
    proposed, surplus = len(entering), int(mask.sum()) - num_kept
    entered = math.ceil(proposed * rate)
    if pairs == "inverse":
        entering.reverse()
        leaving.reverse()
    elif pairs == "random":
        entering.sort(key=lambda i: mixed(seed, step, i))
        leaving.sort(key=lambda i: mixed(seed, step, i))
    after = mask.copy()
    after[entering[:entered]] = True
    after[leaving[: entered + surplus]] = False
    return Swap(proposed, entered, entered + surplus, float(scores[order[num_kept - 1]]), after)


@dataclass
class Search:
    """A whole search over flat layers: `scores`, `masks` and the counters after each `step`."""

    scores: list[Float32]
    masks: list[Bool]
    rates: Sequence[float]  # r(1) ... r(T)
    last_kept: Sequence[int]  # per segment, at the end of the ramp
    ramp: Sequence[float]  # share of the way still to go, for t = 1 ... T
    joint: bool = False
    pairs: str = "best"
    seed: int = 0
    swap_every: int = 1
    steps: int = 0
    skipped: int = 0
    swapped_at: int = 0
    momenta: list[Float32] = field(init=False)
    first_kept: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.momenta = [np.zeros_like(s) for s in self.scores]
        kept = [int(m.sum()) for m in self.masks]
        self.first_kept = [sum(kept)] if self.joint else kept

    def num_kept(self) -> list[int]:
        """K of each segment since the last swap."""
        ramp = self.ramp[self.swapped_at - 1] if self.swapped_at else 1.0
        bounds = zip(self.first_kept, self.last_kept, strict=True)
        return [last + math.ceil((first - last) * ramp) for first, last in bounds]

    def step(
        self, grads: Sequence[Float32 | None], rows: Sequence[Row], found_inf: bool = False
    ) -> list[Swap]:
        """Update and swap, or leave all as it was when a gradient is not finite; return the swaps made."""
        if found_inf or not all(np.isfinite(g).all() for g in grads if g is not None):
            self.skipped += 1
            return []
        self.steps += 1
        for i, (grad, row) in enumerate(zip(grads, rows, strict=True)):
            if grad is not None:
                self.scores[i], self.momenta[i] = update(self.scores[i], self.momenta[i], grad, row)
        if self.steps % self.swap_every and self.steps < len(self.rates):
            return []
        self.swapped_at = self.steps
        return self._swap()

    def _swap(self) -> list[Swap]:
        rate, joint = self.rates[self.steps - 1], self.joint
        scores = [np.concatenate(self.scores)] if joint else self.scores
        masks = [np.concatenate(self.masks)] if joint else self.masks
        swaps = [
            swap(s, m, k, rate, self.pairs, self.seed, self.steps)
            for s, m, k in zip(scores, masks, self.num_kept(), strict=True)
        ]
        after = [s.mask for s in swaps]
        ends = np.cumsum([s.size for s in self.scores])[:-1]
        self.masks = np.split(after[0], ends) if joint else after
        return swaps
